/* A stand-in for libnvidia-ml.so.1 that the real pynvml loads: GPUs without a GPU.
 *
 * $NVML_STUB_STATE names a text file of "key value" lines, read again on each call; the last line of a key counts:
 *   count 2                   GPUs listed            init_error 9              nvmlInit fails so
 *   gpu0.mem_used 1073741824  any figure below       gpu0.error 15             every call on GPU 0 fails so
 *   gpu0.error.throttle 13    one call fails so      gpu0.hang 1               calls on GPU 0 hang while it is there
 *   gpu0.procs 2              processes listed       gpu0.pid0 4711            gpu0.pidmem0 1024 (or none)
 * $NVML_STUB_EVENTS names a file to which "GPU TYPE DATA" lines are appended; type 8 is an Xid error.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef int ret_t;

enum { OK = 0, UNINIT = 1, INVALID = 2, NOT_SUPPORTED = 3, INSUFFICIENT = 7, TIMEOUT = 10, VERSION_MISMATCH = 25 };
enum { GPUS = 16 };

struct dev { int idx; };
static struct dev devices[GPUS];
static int inited;

/* ---- state file ---- */

static int find(const char *key, char *out, size_t size) {
    const char *path = getenv("NVML_STUB_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char name[96], value[192];
    int hit = 0;
    if (!file) return 0;
    while (fscanf(file, "%95s %191s", name, value) == 2)
        if (!strcmp(name, key)) { snprintf(out, size, "%s", value); hit = 1; }
    fclose(file);
    return hit;
}

static int number(const char *key, u64 *out) {
    char value[192];
    if (!find(key, value, sizeof value)) return 0;
    *out = strtoull(value, NULL, 0);
    return 1;
}

static u64 figure(int gpu, const char *name, u64 otherwise) {
    char key[96];
    u64 value;
    snprintf(key, sizeof key, "gpu%d.%s", gpu, name);
    return number(key, &value) ? value : otherwise;
}

/* Every device call passes here: hang, then fail, as the state file says. */
static ret_t enter(struct dev *d, const char *call) {
    char name[64];
    if (!inited) return UNINIT;
    if (d < devices || d >= devices + GPUS) return INVALID;
    while (figure(d->idx, "hang", 0)) usleep(1000);
    snprintf(name, sizeof name, "error.%s", call);
    return (ret_t)figure(d->idx, name, figure(d->idx, "error", 0));
}
#define ENTER(d, call) do { ret_t entered = enter(d, call); if (entered) return entered; } while (0)

/* ---- library ---- */

ret_t nvmlInitWithFlags(u32 flags) {
    u64 error;
    (void)flags;
    if (!getenv("NVML_STUB_STATE")) return 9; /* once loaded it stays: be no GPU to whoever did not ask for one */
    if (number("init_error", &error) && error) return (ret_t)error;
    for (int i = 0; i < GPUS; i++) devices[i].idx = i;
    inited++;
    return OK;
}
ret_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
ret_t nvmlShutdown(void) { if (!inited) return UNINIT; inited--; return OK; }
const char *nvmlErrorString(ret_t r) { return r == 9 ? "Driver Not Loaded" : r == 15 ? "GPU is lost" : "stub error"; }

ret_t nvmlDeviceGetCount_v2(u32 *count) {
    u64 value = 1;
    if (!inited) return UNINIT;
    number("count", &value);
    *count = (u32)value;
    return OK;
}
ret_t nvmlDeviceGetHandleByIndex_v2(u32 i, struct dev **d) {
    u32 count;
    ret_t r = nvmlDeviceGetCount_v2(&count);
    if (r) return r;
    if (i >= count) return INVALID;
    *d = &devices[i];
    ENTER(*d, "handle");
    return OK;
}

/* ---- identity ---- */

ret_t nvmlDeviceGetUUID(struct dev *d, char *out, u32 size) {
    ENTER(d, "uuid");
    snprintf(out, size, "GPU-00000000-0000-0000-0000-%012d", d->idx);
    return OK;
}
ret_t nvmlDeviceGetName(struct dev *d, char *out, u32 size) {
    char key[32];
    ENTER(d, "name");
    snprintf(key, sizeof key, "gpu%d.name", d->idx);
    if (!find(key, out, size)) snprintf(out, size, "NVIDIA-Stub-80GB");
    return OK;
}

/* ---- figures ---- */

struct memory { u64 total, free, used; };
struct memory_v2 { u32 version; u64 total, reserved, free, used; };
struct utilization { u32 gpu, memory; };

ret_t nvmlDeviceGetMemoryInfo(struct dev *d, struct memory *m) { /* v1 counts the driver's reserve as used */
    ENTER(d, "memory");
    m->total = figure(d->idx, "mem_total", 80ULL << 30);
    m->used = figure(d->idx, "mem_used", 1ULL << 30) + figure(d->idx, "mem_reserved", 0);
    m->free = m->total - m->used;
    return OK;
}
ret_t nvmlDeviceGetMemoryInfo_v2(struct dev *d, struct memory_v2 *m) {
    ENTER(d, "memory_v2");
    if (m->version != 0x02000028) return VERSION_MISMATCH;
    m->total = figure(d->idx, "mem_total", 80ULL << 30);
    m->reserved = figure(d->idx, "mem_reserved", 0);
    m->used = figure(d->idx, "mem_used", 1ULL << 30);
    m->free = m->total - m->used - m->reserved;
    return OK;
}
ret_t nvmlDeviceGetUtilizationRates(struct dev *d, struct utilization *u) {
    ENTER(d, "utilization");
    u->gpu = (u32)figure(d->idx, "util", 0);
    u->memory = (u32)figure(d->idx, "mem_util", 0);
    return OK;
}

#define FIGURE(function, call, key, otherwise) \
    ret_t function(struct dev *d, u32 *out) { ENTER(d, call); *out = (u32)figure(d->idx, key, otherwise); return OK; }
#define FIGURE_OF(function, call, key, otherwise) \
    ret_t function(struct dev *d, u32 which, u32 *out) { \
        (void)which; ENTER(d, call); *out = (u32)figure(d->idx, key, otherwise); return OK; }

FIGURE_OF(nvmlDeviceGetTemperature, "temperature", "temp", 40)
FIGURE(nvmlDeviceGetPowerUsage, "power", "power_mw", 70000)
FIGURE_OF(nvmlDeviceGetClockInfo, "clock", "clock_sm", 1980)
FIGURE_OF(nvmlDeviceGetMaxClockInfo, "clock_max", "clock_sm_max", 1980)
FIGURE(nvmlDeviceGetCurrPcieLinkWidth, "pcie", "pcie_width", 16)
FIGURE(nvmlDeviceGetMaxPcieLinkWidth, "pcie_max", "pcie_width_max", 16)

ret_t nvmlDeviceGetCurrentClocksEventReasons(struct dev *d, u64 *mask) {
    ENTER(d, "event_reasons");
    *mask = figure(d->idx, "throttle", 0);
    return OK;
}
ret_t nvmlDeviceGetCurrentClocksThrottleReasons(struct dev *d, u64 *mask) { /* the name that old drivers have */
    ENTER(d, "throttle");
    *mask = figure(d->idx, "throttle", 0);
    return OK;
}

/* ---- health ---- */

ret_t nvmlDeviceGetTotalEccErrors(struct dev *d, u32 type, u32 counter, u64 *count) {
    ENTER(d, "ecc");
    *count = figure(d->idx, type == 1 ? (counter == 0 ? "ecc_dbe" : "ecc_dbe_ever") : "ecc_sbe", 0);
    return OK;
}
ret_t nvmlDeviceGetRemappedRows(struct dev *d, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed) {
    ENTER(d, "remap");
    *corrected = (u32)figure(d->idx, "remap_corr", 0);
    *uncorrected = (u32)figure(d->idx, "remap_unc", 0);
    *pending = (u32)figure(d->idx, "remap_pending", 0);
    *failed = (u32)figure(d->idx, "remap_failed", 0);
    return OK;
}

struct field { u32 id, scope; long long timestamp, latency; u32 type; ret_t result; u64 value; };
ret_t nvmlDeviceGetFieldValues(struct dev *d, int count, struct field *fields) {
    ENTER(d, "fields");
    for (int i = 0; i < count; i++) {
        fields[i].value = figure(d->idx, "recovery_action", 99);
        fields[i].type = 1;
        fields[i].result = fields[i].id == 230 && fields[i].value != 99 ? OK : NOT_SUPPORTED;
    }
    return OK;
}

/* ---- processes ---- */

struct process { u32 pid; u64 used; u32 gi, ci; };

static ret_t processes(struct dev *d, const char *key, u32 *count, struct process *out) {
    u32 have = (u32)figure(d->idx, key, 0);
    if (have && (!out || *count < have)) { *count = have; return INSUFFICIENT; }
    for (u32 i = 0; i < have; i++) {
        char name[96], value[64];
        snprintf(name, sizeof name, "pid%u", i);
        out[i].pid = (u32)figure(d->idx, name, 1000 + i);
        snprintf(name, sizeof name, "gpu%d.pidmem%u", d->idx, i);
        out[i].used = !find(name, value, sizeof value) ? 2ULL << 30
                      : !strcmp(value, "none")         ? ~0ULL
                                                       : strtoull(value, NULL, 0);
        out[i].gi = out[i].ci = 0xFFFFFFFF;
    }
    *count = have;
    return OK;
}
ret_t nvmlDeviceGetComputeRunningProcesses_v3(struct dev *d, u32 *count, struct process *out) {
    ENTER(d, "procs");
    return processes(d, "procs", count, out);
}
ret_t nvmlDeviceGetGraphicsRunningProcesses_v3(struct dev *d, u32 *count, struct process *out) {
    ENTER(d, "gprocs");
    (void)out;
    *count = 0;
    return OK;
}

/* ---- events ---- */

struct event { struct dev *d; u64 type, data; u32 gi, ci; };
struct set { u64 mask[GPUS]; long offset; };

ret_t nvmlEventSetCreate(struct set **s) { *s = calloc(1, sizeof **s); return OK; }
ret_t nvmlEventSetFree(struct set *s) { free(s); return OK; }
ret_t nvmlDeviceRegisterEvents(struct dev *d, u64 mask, struct set *s) {
    ENTER(d, "register");
    s->mask[d->idx] |= mask;
    return OK;
}

static int next_event(struct set *s, FILE *file, struct event *out) {
    int gpu;
    u64 type, data;
    fseek(file, s->offset, SEEK_SET);
    while (fscanf(file, "%d %llu %llu", &gpu, &type, &data) == 3) {
        s->offset = ftell(file);
        if (gpu < 0 || gpu >= GPUS || !(s->mask[gpu] & type)) continue;
        *out = (struct event){&devices[gpu], type, data, 0xFFFFFFFF, 0xFFFFFFFF};
        return 1;
    }
    return 0;
}
ret_t nvmlEventSetWait_v2(struct set *s, struct event *out, u32 timeout_ms) {
    const char *path = getenv("NVML_STUB_EVENTS");
    u64 error;
    if (number("wait_error", &error) && error) return (ret_t)error;
    for (u32 waited = 0;; waited += 2) {
        FILE *file = path ? fopen(path, "r") : NULL;
        int found = file && next_event(s, file, out);
        if (file) fclose(file);
        if (found) return OK;
        if (waited >= timeout_ms) return TIMEOUT;
        usleep(2000);
    }
}
