/* The part of libnvidia-ml.so.1 that a hive asks, answered from a text file.
 *
 * FAKE_NVML names the file; it is looked at in every call and read again when it was replaced.
 * Its lines are fields between tabs, the first one the kind of line, the others KEY=VALUE:
 *
 *   driver   version=550.54.15 cuda=12040 generation=1 error=9 delay_ms=0
 *   gpu      uuid= name= total= used= util= temp= power= major= minor= error= ecc= remap= mig=1
 *            place=NODE/BRIDGE/SWITCH nvlink=NAME
 *            unsupported=util,temp,power,memory,processes,uuid,mig
 *   mig      uuid= name= total= used=              of the gpu above
 *   process  pid= used= name=                      of the gpu or mig above
 *
 * GPUs of one nvlink name are joined by NVLink; one without a place does not tell its topology.
 * Sizes are bytes, power is milliwatts, error is an NVML return code that is given instead of an
 * answer. A library that was initialised under another generation is no longer initialised: that
 * is what a reload of the driver looks like. Signatures and codes: nvml.h.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6,
       INSUFFICIENT_SIZE, DRIVER_NOT_LOADED = 9 };
enum { DEVICES = 64, PROCESSES = 64, MIGS = 7 };

typedef unsigned long long u64;
typedef struct { unsigned pid; u64 used; char name[128]; } Process;
typedef struct {
    int is_mig, parent, mig, error, major, minor, remap, processes;
    u64 total, used, util, temp, power, ecc;
    char uuid[96], name[96], unsupported[128], place[32], nvlink[32];
    Process process[PROCESSES];
} Device;

static Device device[DEVICES];
static int devices, driver_error, generation, opened = -1, delay_ms;
static int cuda;
static char version[80];
static pthread_mutex_t reading = PTHREAD_MUTEX_INITIALIZER;

static char *value(char *line, const char *key) {
    size_t length = strlen(key);
    for (char *at = strchr(line, '\t'); at; at = strchr(at, '\t')) {
        at++;
        if (!strncmp(at, key, length) && at[length] == '=') return at + length + 1;
    }
    return NULL;
}
static u64 number(char *line, const char *key) {
    char *found = value(line, key);
    return found ? strtoull(found, NULL, 10) : 0;
}
static void text(char *line, const char *key, char *into, size_t size) {
    char *found = value(line, key);
    size_t length = found ? strcspn(found, "\t\n") : 0;
    if (length >= size) length = size - 1;
    if (length) memcpy(into, found, length);
    into[length] = 0;
}

static void take(char *line) {
    if (!strncmp(line, "driver", 6)) {
        driver_error = number(line, "error");
        generation = number(line, "generation");
        delay_ms = number(line, "delay_ms");
        cuda = number(line, "cuda");
        text(line, "version", version, sizeof version);
    } else if ((!strncmp(line, "gpu", 3) || !strncmp(line, "mig\t", 4)) && devices < DEVICES) {
        Device *d = &device[devices++];
        memset(d, 0, sizeof *d);
        d->is_mig = *line == 'm';
        for (d->parent = devices - 1; device[d->parent].is_mig; d->parent--);
        d->total = number(line, "total"); d->used = number(line, "used");
        d->util = number(line, "util"); d->temp = number(line, "temp");
        d->power = number(line, "power"); d->ecc = number(line, "ecc");
        d->major = number(line, "major"); d->minor = number(line, "minor");
        d->error = number(line, "error"); d->mig = number(line, "mig");
        d->remap = number(line, "remap");
        text(line, "uuid", d->uuid, sizeof d->uuid);
        text(line, "name", d->name, sizeof d->name);
        text(line, "unsupported", d->unsupported, sizeof d->unsupported);
        text(line, "place", d->place, sizeof d->place);
        text(line, "nvlink", d->nvlink, sizeof d->nvlink);
    } else if (!strncmp(line, "process", 7) && devices) {
        Device *d = &device[devices - 1];
        if (d->processes == PROCESSES) return;
        Process *p = &d->process[d->processes++];
        p->pid = number(line, "pid"); p->used = number(line, "used");
        text(line, "name", p->name, sizeof p->name);
    }
}

static void refresh(void) {
    static struct stat last;
    struct stat now;
    const char *path = getenv("FAKE_NVML");
    if (!path || stat(path, &now)) { driver_error = DRIVER_NOT_LOADED; last.st_ino = 0; return; }
    if (now.st_ino == last.st_ino && now.st_mtim.tv_nsec == last.st_mtim.tv_nsec) return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    last = now;
    char line[1024];
    devices = driver_error = 0;
    while (fgets(line, sizeof line, file)) take(line);
    fclose(file);
}

/* The state as it is now; an error that stands for every call. */
static int begin(void) {
    pthread_mutex_lock(&reading);
    refresh();
    int pause = delay_ms;
    int code = driver_error ? driver_error : opened != generation ? UNINITIALIZED : SUCCESS;
    pthread_mutex_unlock(&reading);
    if (pause) usleep(1000 * pause);
    return code;
}
static Device *of(void *handle) { return &device[(size_t)handle - 1]; }

/* The same, for a call about a device that may not support it. */
static int about(void *handle, const char *what) {
    int code = begin();
    if (code) return code;
    Device *d = of(handle);
    if (device[d->parent].error) return device[d->parent].error;
    return strstr(d->unsupported, what) ? NOT_SUPPORTED : SUCCESS;
}
#define ASK(handle, what) int code = about(handle, what); if (code) return code; Device *d = of(handle)
#define WHOLE(handle, what) ASK(handle, what); if (d->is_mig) return INVALID_ARGUMENT

static void *nth(int is_mig, int parent, unsigned index) {
    for (int i = 0; i < devices; i++)
        if (device[i].is_mig == is_mig && (!is_mig || device[i].parent == parent) && !index--)
            return (void *)(size_t)(i + 1);
    return NULL;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = begin();
    if (code && code != UNINITIALIZED) return code;
    opened = generation;
    return SUCCESS;
}
int nvmlShutdown(void) { opened = -1; return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake's"; }
int nvmlSystemGetDriverVersion(char *into, unsigned size) {
    int code = begin();
    if (!code) snprintf(into, size, "%s", version);
    return code;
}
int nvmlSystemGetCudaDriverVersion_v2(int *into) { int code = begin(); *into = cuda; return code; }
int nvmlSystemGetProcessName(unsigned pid, char *into, unsigned size) {
    int code = begin();
    if (code) return code;
    for (int i = 0; i < devices; i++)
        for (int p = 0; p < device[i].processes; p++)
            if (device[i].process[p].pid == pid && *device[i].process[p].name)
                return snprintf(into, size, "%s", device[i].process[p].name) < 0;
    return NOT_FOUND;
}
int nvmlDeviceGetCount_v2(unsigned *into) {
    int code = begin();
    if (code) return code;
    for (*into = 0; nth(0, 0, *into); ++*into);
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **into) {
    int code = begin();
    if (code) return code;
    if (!(*into = nth(0, 0, index))) return INVALID_ARGUMENT;
    return of(*into)->error;
}
int nvmlDeviceGetName(void *h, char *into, unsigned size) {
    ASK(h, "name"); snprintf(into, size, "%s", d->name); return SUCCESS;
}
int nvmlDeviceGetUUID(void *h, char *into, unsigned size) {
    ASK(h, "uuid"); snprintf(into, size, "%s", d->uuid); return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) {
    ASK(h, "capability"); *major = d->major; *minor = d->minor; return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *h, u64 *into) {
    ASK(h, "memory");
    into[0] = d->total; into[1] = d->total - d->used; into[2] = d->used;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(void *h, unsigned *into) {
    WHOLE(h, "util"); into[0] = d->util; into[1] = 0; return SUCCESS;
}
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *into) {
    (void)sensor; WHOLE(h, "temp"); *into = d->temp; return SUCCESS;
}
int nvmlDeviceGetPowerUsage(void *h, unsigned *into) {
    WHOLE(h, "power"); *into = d->power; return SUCCESS;
}
int nvmlDeviceGetTotalEccErrors(void *h, int kind, int counter, u64 *into) {
    (void)counter; WHOLE(h, "ecc"); *into = kind ? d->ecc : 0; return SUCCESS;
}
int nvmlDeviceGetRemappedRows(void *h, unsigned *a, unsigned *b, unsigned *c, unsigned *failed) {
    WHOLE(h, "remap"); *a = *b = *c = 0; *failed = d->remap; return SUCCESS;
}
int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    WHOLE(h, "mig"); *current = *pending = d->mig; return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(void *h, unsigned *into) {
    WHOLE(h, "mig"); *into = MIGS; return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *h, unsigned index, void **into) {
    WHOLE(h, "mig"); *into = nth(1, d->parent, index); return *into ? SUCCESS : NOT_FOUND;
}

/* Whether two places ("0/1/2") are the same up to so many parts. */
static int together(const char *one, const char *other, int parts) {
    for (; *one && *one == *other; one++, other++)
        if (*one == '/' && !--parts) return 1;
    return *one == *other;
}
int nvmlDeviceGetTopologyCommonAncestor(void *h, void *other_handle, unsigned *into) {
    WHOLE(h, "topology");
    Device *other = of(other_handle);
    if (!*d->place || !*other->place) return NOT_SUPPORTED;
    *into = together(d->place, other->place, 3)   ? 10
            : together(d->place, other->place, 2) ? 30
            : together(d->place, other->place, 1) ? 40
                                                  : 50;
    return SUCCESS;
}
int nvmlDeviceGetP2PStatus(void *h, void *other_handle, unsigned index, unsigned *into) {
    WHOLE(h, "p2p");
    Device *other = of(other_handle);
    int linked = *d->nvlink && !strcmp(d->nvlink, other->nvlink);
    *into = index == 2 && linked ? 0 : 5;
    return SUCCESS;
}

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } ProcessInfo;
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, ProcessInfo *into) {
    ASK(h, "processes");
    unsigned room = *count;
    *count = d->processes;
    if (room < *count) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < *count; i++)
        into[i] = (ProcessInfo){d->process[i].pid, d->process[i].used, 0, 0};
    return SUCCESS;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *h, unsigned *count, ProcessInfo *into) {
    return nvmlDeviceGetComputeRunningProcesses_v3(h, count, into);
}
