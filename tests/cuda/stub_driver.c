/* A driver library on host memory, to see that every call reaches C with the arguments that its prototype states.
   The one kernel that it knows negates floats: kernel(const float *x, float *out, int64_t n). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int result;
typedef struct { float *x, *out; int64_t n; void *target, *source; size_t bytes; } work;
static work captured[64];
static int num_captured = -1;
static int last_grid, last_block, last_shared, log_size;
static char *log_place;

static void run(work *w) {
    for (int64_t i = 0; i < w->n; i++) w->out[i] = -w->x[i];
    if (w->bytes) memcpy(w->target, w->source, w->bytes);
}
static result hand_over(work w) {
    if (num_captured >= 0) captured[num_captured++] = w; else run(&w);
    return 0;
}
static void *some_handle(void) { static char place[4096]; static int next; return place + next++ % 4096; }

result cuInit(unsigned flags) { return flags; }
result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
result cuDeviceGetCount(int *count) { *count = 1; return 0; }
result cuDeviceGet(int *device, int ordinal) { *device = ordinal + 7; return ordinal ? 101 : 0; }
result cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Stub", length); return device != 7; }
result cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 4 : 1 << 17;
    return device != 7;
}
result cuDevicePrimaryCtxRetain(void **context, int device) { *context = some_handle(); return device != 7; }
result cuCtxSetCurrent(void *context) { return context == 0; }
result cuCtxSynchronize(void) { return 0; }
result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = 1ull << 36; *total = 1ull << 37; return 0; }
result cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    if (bytes > 1ull << 30) return 2;
    *address = (uint64_t)(uintptr_t)aligned_alloc(512, (bytes + 511) / 512 * 512);
    return 0;
}
result cuMemFree_v2(uint64_t address) { free((void *)(uintptr_t)address); return 0; }
result cuMemHostAlloc(void **address, size_t bytes, unsigned flags) { *address = malloc(bytes); return flags; }
result cuMemFreeHost(void *address) { free(address); return 0; }
result cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    memcpy((void *)(uintptr_t)to, from, bytes);
    return stream == 0;
}
result cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return stream == 0;
}
result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    work w = {0, 0, 0, (void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes};
    return stream == 0 ? 1 : hand_over(w);
}
result cuStreamCreate(void **stream, unsigned flags) { *stream = some_handle(); return flags != 1; }
result cuStreamSynchronize(void *stream) { return stream == 0; }
result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return stream == 0 || event == 0 || flags; }
result cuEventCreate(void **event, unsigned flags) { *event = some_handle(); return flags & ~2u; }
result cuEventDestroy_v2(void *event) { return event == 0; }
result cuEventRecord(void *event, void *stream) { return event == 0 || stream == 0; }
result cuEventSynchronize(void *event) { return event == 0; }
result cuEventElapsedTime(float *time, void *start, void *end) { *time = 0.25f; return start == 0 || end == 0; }
static char linked[4096];
static size_t num_linked;
result cuLinkCreate_v2(unsigned count, int *options, void **values, void **state) {
    if (count != 2 || options[0] != 5 || options[1] != 6) return 1;
    log_place = values[0], log_size = (int)(uintptr_t)values[1];
    *state = some_handle();
    return 0;
}
result cuLinkAddData_v2(void *state, int kind, void *data, size_t size, const char *name, unsigned count, int *options,
                        void **values) {
    if (!state || kind != 1 || count || options || values || !name[0]) return 1;
    if (strstr(data, "broken")) { strncpy(log_place, "line 2: broken", log_size); return 218; }
    num_linked = size + 2, linked[0] = 0x7f, linked[1] = 0;
    memcpy(linked + 2, data, size);
    return 0;
}
result cuLinkComplete(void *state, void **code, size_t *size) {
    *code = linked, *size = num_linked;
    return state == 0;
}
result cuLinkDestroy(void *state) { return state == 0; }
result cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values) {
    if (count != 2 || options[0] != 5 || options[1] != 6) return 1;
    log_size = (int)(uintptr_t)values[1];
    if (strstr(image, "broken")) { strncpy(values[0], "line 1: broken", log_size); return 218; }
    *module = some_handle();
    return 0;
}
result cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = some_handle();
    return module == 0 || strcmp(name, "kernel");
}
result cuModuleUnload(void *module) { return module == 0; }
result cuFuncSetAttribute(void *function, int attribute, int value) { return function == 0 || attribute != 8 || !value; }
result cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **arguments, void **extra) {
    if (!function || gy != 1 || gz != 1 || by != 1 || bz != 1 || !stream || extra) return 1;
    last_grid = gx, last_block = bx, last_shared = shared;
    work w = {*(float **)arguments[0], *(float **)arguments[1], *(int64_t *)arguments[2], 0, 0, 0};
    return hand_over(w);
}
int stub_last_launch(int which) { return which == 0 ? last_grid : which == 1 ? last_block : last_shared; }
result cuStreamBeginCapture_v2(void *stream, int mode) { num_captured = 0; return stream == 0 || mode != 2; }
static int num_kept;
result cuStreamEndCapture(void *stream, void **graph) {
    *graph = some_handle(), num_kept = num_captured, num_captured = -1;
    return stream == 0;
}
result cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    *executable = some_handle();
    return graph == 0 || flags;
}
result cuGraphLaunch(void *executable, void *stream) {
    for (int i = 0; i < num_kept; i++) run(&captured[i]);
    return executable == 0 || stream == 0;
}
result cuGraphDestroy(void *graph) { return graph == 0; }
result cuGraphExecDestroy(void *executable) { return executable == 0; }
result cuGetErrorName(int code, const char **text) { *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return 0; }
result cuGetErrorString(int code, const char **text) { *text = "in the stub's words"; return code == 0; }
