"""The durable queue as a library; its calls, by the names of an older package."""

from hive_orchestration.api import (
    OrchestrationClient,
    create_task,
    delete_task,
    get_active_workers,
    get_client,
    get_queued_tasks,
    get_task,
    get_tasks_by_status,
    get_worker,
    register_worker,
    unregister_worker,
    update_task_status,
    update_worker_heartbeat,
)

__all__ = [
    "OrchestrationClient",
    "create_task",
    "delete_task",
    "get_active_workers",
    "get_client",
    "get_queued_tasks",
    "get_task",
    "get_tasks_by_status",
    "get_worker",
    "register_worker",
    "unregister_worker",
    "update_task_status",
    "update_worker_heartbeat",
]
