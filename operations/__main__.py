"""``python -m operations`` prints the JSON schema of every operation."""

import json

from operations.operations import json_schema

print(json.dumps(json_schema(), indent=2))
