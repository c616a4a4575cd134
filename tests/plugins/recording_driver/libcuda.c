/* A driver library without a GPU: it records every call with its arguments, and rejects the calls
   that a real driver rejects. It is loaded as libcuda.so.1; see __init__.py in this folder.

   Environment variables, with defaults after the semicolon:
     RECORDING_LOG       file that calls are appended to, one JSON object per line
     RECORDING_CUDA      CUDA version that the driver supports, in cuDriverGetVersion's form; 13000
     RECORDING_GPUS      compute capabilities of the GPUs, e.g. "89,120"; "89"
     RECORDING_REFUSE    calls that always fail, with error codes, e.g. "cuInit=999,cuMemAlloc=2"
     RECORDING_FREE      free memory that cuMemGetInfo reports, in bytes; 8 GiB
     RECORDING_EXACT     1: the number of a launch's arguments is checked, see `pointers_in`; 0
     RECORDING_PLANT     a fault of every product kernel: "value", "outside", "moving", "hang", "crash",
                         or "address" for an illegal address
     CUDA_VISIBLE_DEVICES  visible GPUs, as indices only

   work.h has memory, and work in streams. A module whose image names a library of the PTX runner runs
   its kernels; other kernels do nothing. Error codes are those of cuda.h. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
  INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209,
  UNSUPPORTED_PTX_VERSION = 222, INVALID_HANDLE = 400, NOT_FOUND = 500,
  CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_IMPLICIT = 906,
};
enum { MOST_GPUS = 8, USUAL_SHARED = 48 << 10, RESERVED_SHARED = 1 << 10, NON_BLOCKING = 1 };
enum { NOT_CAPTURING, CAPTURING, INVALIDATED };

typedef struct Context { int device, references; uint64_t id; } Context;
typedef struct Module { Context *context; char *image; size_t size; struct Runner *runner; } Module;
typedef struct Function { Module *module; int shared; } Function;
typedef struct Stream { Context *context; unsigned flags; int state; struct Stream *next; } Stream;

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static int initialized, gpus[MOST_GPUS], numbers[MOST_GPUS], gpu_count;
static Context primary[MOST_GPUS];
static uint64_t contexts_made = 100;
static Stream *streams;
static __thread Context *current;
static __thread Context *below[16]; /* The contexts under the current one. */
static __thread int depth;
static int pushed_contexts; /* Of all threads; 0 at the end of a balanced process. */

#include "work.h"

static long setting(const char *name, long usual) {
  const char *text = getenv(name);
  return text && *text ? atol(text) : usual;
}

static int driver_version(void) { return (int)setting("RECORDING_CUDA", 13000); }

/* Record a call and return its status. */
static int said(int status, const char *name, const char *format, ...) {
  const char *log = getenv("RECORDING_LOG");
  if (!log) return status;
  char line[600];
  int used = snprintf(line, sizeof line, "{\"call\": \"%s\", \"status\": %d", name, status);
  if (*format) {
    va_list values;
    va_start(values, format);
    used += snprintf(line + used, sizeof line - used, ", ");
    used += vsnprintf(line + used, sizeof line - used, format, values);
    va_end(values);
  }
  used += snprintf(line + used, sizeof line - used, ", \"thread\": %d}\n", (int)gettid());
  FILE *file = fopen(log, "a");
  if (file) {
    fwrite(line, 1, used, file);
    fclose(file);
  }
  return status;
}

/* The status of a call that RECORDING_REFUSE sets, else OK. */
static int refused(const char *name) {
  const char *all = getenv("RECORDING_REFUSE");
  char wanted[80];
  snprintf(wanted, sizeof wanted, "%s=", name);
  const char *at = all ? strstr(all, wanted) : NULL;
  return at && (at == all || at[-1] == ',') ? atoi(at + strlen(wanted)) : OK;
}

/* A call that is forbidden during a capture invalidates the capture. */
static int during_capture(void) {
  int found = OK;
  for (Stream *s = streams; s; s = s->next)
    if (s->state != NOT_CAPTURING) {
      s->state = INVALIDATED;
      found = CAPTURE_UNSUPPORTED;
    }
  return found;
}

/* Work in a stream; work in the legacy default stream waits for every blocking stream. */
static int work_on(Stream *stream) {
  if (stream) return stream->state == INVALIDATED ? CAPTURE_INVALIDATED : OK;
  int found = OK;
  for (Stream *s = streams; s; s = s->next)
    if (s->state != NOT_CAPTURING && !(s->flags & NON_BLOCKING)) {
      s->state = INVALIDATED;
      found = CAPTURE_IMPLICIT;
    }
  return found;
}

static int ready(const char *name) {
  int status = refused(name);
  if (status) return status;
  return initialized ? OK : NOT_INITIALIZED;
}

static int in_context(const char *name) {
  int status = ready(name);
  return status ? status : failed ? failed : current ? OK : INVALID_CONTEXT;
}

int cuInit(unsigned flags) {
  int status = refused("cuInit");
  if (status) return said(status, "cuInit", "\"flags\": %u", flags);
  pthread_mutex_lock(&lock);
  if (!initialized) {
    const char *all = getenv("RECORDING_GPUS"), *seen = getenv("CUDA_VISIBLE_DEVICES");
    int there[MOST_GPUS], count = 0;
    for (const char *at = all ? all : "89"; *at && count < MOST_GPUS;) {
      char *end;
      there[count++] = (int)strtol(at, &end, 10);
      at = *end == ',' ? end + 1 : end;
    }
    for (int i = 0; !seen && i < count; ++i) gpus[gpu_count] = there[i], numbers[gpu_count++] = i;
    /* GPUs after an invalid index are not visible, either. */
    for (const char *at = seen; at && *at;) {
      char *end;
      long number = strtol(at, &end, 10);
      if (end == at || number < 0 || number >= count) break;
      gpus[gpu_count] = there[number], numbers[gpu_count++] = (int)number;
      at = *end == ',' ? end + 1 : end;
    }
    for (int i = 0; i < gpu_count; ++i) primary[i].device = i;
    initialized = gpu_count > 0;
  }
  status = initialized ? OK : NO_DEVICE;
  pthread_mutex_unlock(&lock);
  return said(status, "cuInit", "\"flags\": %u", flags);
}

int cuDriverGetVersion(int *version) {
  *version = driver_version();
  return said(refused("cuDriverGetVersion"), "cuDriverGetVersion", "");
}

int cuGetErrorName(int error, const char **text) { *text = "ERROR"; return error < 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error"; return error < 0; }

int cuDeviceGetCount(int *count) {
  int status = ready("cuDeviceGetCount");
  *count = gpu_count;
  return said(status, "cuDeviceGetCount", "");
}

int cuDeviceGet(int *device, int ordinal) {
  int status = ready("cuDeviceGet");
  if (!status && (ordinal < 0 || ordinal >= gpu_count)) status = INVALID_DEVICE;
  *device = ordinal;
  return said(status, "cuDeviceGet", "\"ordinal\": %d", ordinal);
}

int cuDeviceGetName(char *name, int length, int device) {
  int status = ready("cuDeviceGetName");
  snprintf(name, length, "Recording GPU %d", device);
  return said(status, "cuDeviceGetName", "\"device\": %d", device);
}

/* The UUID contains the GPU's index among all GPUs, so tests can distinguish hidden GPUs. */
int cuDeviceGetUuid(unsigned char *uuid, int device) {
  int status = ready("cuDeviceGetUuid");
  if (!status && (device < 0 || device >= gpu_count)) status = INVALID_DEVICE;
  if (!status) memset(uuid, 0x10 + numbers[device], 16);
  return said(status, "cuDeviceGetUuid", "\"device\": %d", device);
}

int cuDeviceTotalMem(size_t *bytes, int device) {
  *bytes = (size_t)24 << 30;
  return said(ready("cuDeviceTotalMem"), "cuDeviceTotalMem", "\"device\": %d", device);
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int status = ready("cuDeviceGetAttribute");
  if (!status && (device < 0 || device >= gpu_count)) status = INVALID_DEVICE;
  int capability = status ? 0 : gpus[device];
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
  if (attribute == 16) *value = 128;
  return said(status, "cuDeviceGetAttribute", "\"attribute\": %d, \"device\": %d", attribute, device);
}

int cuDevicePrimaryCtxRetain(Context **context, int device) {
  int status = ready("cuDevicePrimaryCtxRetain");
  if (!status && (device < 0 || device >= gpu_count)) status = INVALID_DEVICE;
  pthread_mutex_lock(&lock);
  if (!status) {
    if (!primary[device].references++ || !primary[device].id) primary[device].id = ++contexts_made;
    *context = &primary[device];
  }
  pthread_mutex_unlock(&lock);
  return said(status, "cuDevicePrimaryCtxRetain", "\"device\": %d", device);
}

int cuDevicePrimaryCtxRelease(int device) {
  primary[device].references--;
  return said(ready("cuDevicePrimaryCtxRelease"), "cuDevicePrimaryCtxRelease", "\"device\": %d", device);
}

/* The next context has the same address but none of the modules. */
int cuDevicePrimaryCtxReset(int device) {
  primary[device].id = ++contexts_made;
  return said(ready("cuDevicePrimaryCtxReset"), "cuDevicePrimaryCtxReset", "\"device\": %d", device);
}

int cuCtxGetCurrent(Context **context) {
  int status = ready("cuCtxGetCurrent");
  *context = current;
  return said(status, "cuCtxGetCurrent", "\"none\": %d", current == NULL);
}

int cuCtxSetCurrent(Context *context) {
  int status = ready("cuCtxSetCurrent");
  if (!status) current = context;
  return said(status, "cuCtxSetCurrent", "\"device\": %d", context ? context->device : -1);
}

int cuCtxPushCurrent(Context *context) {
  int status = ready("cuCtxPushCurrent");
  if (!status && (!context || depth == 16)) status = INVALID_CONTEXT;
  if (!status) below[depth++] = current, current = context, ++pushed_contexts;
  return said(status, "cuCtxPushCurrent", "\"depth\": %d", depth);
}

int cuCtxPopCurrent(Context **context) {
  int status = ready("cuCtxPopCurrent");
  if (!status && !depth) status = INVALID_CONTEXT;
  if (!status) {
    if (context) *context = current;
    current = below[--depth], --pushed_contexts;
  }
  return said(status, "cuCtxPopCurrent", "\"depth\": %d", depth);
}

int cuCtxSynchronize(void) {
  int status = in_context("cuCtxSynchronize");
  if (!status) status = during_capture();
  if (!status) status = finish(NULL, 1, NULL);
  return said(status, "cuCtxSynchronize", "");
}

int cuCtxGetDevice(int *device) {
  int status = in_context("cuCtxGetDevice");
  if (!status) *device = current->device;
  return said(status, "cuCtxGetDevice", "");
}

int cuCtxGetId(Context *context, unsigned long long *id) {
  int status = ready("cuCtxGetId");
  if (!context) context = current;
  if (!status && !context) status = INVALID_CONTEXT;
  if (!status) *id = context->id;
  return said(status, "cuCtxGetId", "");
}

int cuMemGetInfo(size_t *unused, size_t *total) {
  *unused = (size_t)setting("RECORDING_FREE", 8L << 30), *total = (size_t)24 << 30;
  return said(in_context("cuMemGetInfo"), "cuMemGetInfo", "");
}

/* The newest PTX version that a driver supports, from CUDA's release notes. */
static int newest_ptx(int cuda) {
  static const int known[][2] = {
      {12000, 80}, {12010, 81}, {12020, 82}, {12030, 83}, {12040, 84}, {12050, 85},
      {12060, 85}, {12070, 86}, {12080, 87}, {12090, 88}, {13000, 90}};
  int found = 78;
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    if (cuda >= known[i][0]) found = known[i][1];
  return cuda > 13000 ? 90 + (cuda - 13000) / 10 : found;
}

static int check_image(const char *image, size_t *size, int capability) {
  if (!memcmp(image, "\x7f" "ELF", 4)) {
    const unsigned char *bytes = (const unsigned char *)image;
    uint64_t sections = *(const uint64_t *)(bytes + 40);
    uint16_t each = *(const uint16_t *)(bytes + 58), count = *(const uint16_t *)(bytes + 60);
    uint64_t programs = *(const uint64_t *)(bytes + 32);
    uint16_t each_program = *(const uint16_t *)(bytes + 54), held = *(const uint16_t *)(bytes + 56);
    uint64_t end = sections + (uint64_t)each * count, other = programs + (uint64_t)each_program * held;
    *size = end > other ? end : other;
    uint32_t flags = *(const uint32_t *)(bytes + 48);
    /* NVRTC 13 writes version 8 of the format, with the architecture one byte higher; NVRTC 12.8
    does
       so only for Blackwell. */
    int newer = bytes[8] >= 8, arch = newer ? flags >> 8 & 0xff : flags & 0xff;
    if (newer && driver_version() < (arch >= 100 ? 12080 : 13000)) return INVALID_IMAGE;
    return arch / 10 == capability / 10 && arch <= capability ? OK : NO_BINARY_FOR_GPU;
  }
  *size = strlen(image);
  const char *version = strstr(image, "\n.version "), *target = strstr(image, "\n.target sm_");
  int major, minor;
  if (!version || !target || sscanf(version, "\n.version %d.%d", &major, &minor) != 2)
    return INVALID_IMAGE;
  if (10 * major + minor > newest_ptx(driver_version())) return UNSUPPORTED_PTX_VERSION;
  return atoi(target + strlen("\n.target sm_")) <= capability ? OK : NO_BINARY_FOR_GPU;
}

int cuModuleLoadData(Module **module, const void *image) {
  int status = in_context("cuModuleLoadData");
  if (!status) status = during_capture();
  size_t size = 0;
  if (!status) status = check_image(image, &size, gpus[current->device]);
  if (!status) {
    *module = malloc(sizeof **module);
    **module = (Module){current, malloc(size), size, NULL};
    memcpy((*module)->image, image, size);
    (*module)->runner = runner_of((*module)->image, size);
  }
  return said(status, "cuModuleLoadData", "\"bytes\": %zu", size);
}

int cuModuleGetFunction(Function **function, Module *module, const char *name) {
  int status = in_context("cuModuleGetFunction");
  if (!status && !memmem(module->image, module->size, name, strlen(name))) status = NOT_FOUND;
  if (!status) {
    *function = malloc(sizeof **function);
    **function = (Function){module, 0};
  }
  return said(status, "cuModuleGetFunction", "\"name\": \"%s\"", name);
}

static int most_shared(int capability) {
  int kib = capability == 75 ? 64 : capability == 80 || capability == 87 ? 163
          : capability >= 90 && capability < 120 ? 227 : 99;
  return kib << 10;
}

int cuFuncSetAttribute(Function *function, int attribute, int value) {
  int status = in_context("cuFuncSetAttribute");
  if (!status && attribute == 8) {
    if (value > most_shared(gpus[function->module->context->device])) status = INVALID_VALUE;
    else function->shared = value;
  }
  return said(status, "cuFuncSetAttribute", "\"attribute\": %d, \"value\": %d", attribute, value);
}

/* A number after the mark of properties in a module's image; 0 without them. */
static int property_of(Function *function, int index) {
  static const char mark[] = "PROPERTIES:";
  const Module *module = function->module;
  const char *at = memmem(module->image, module->size, mark, strlen(mark));
  if (!at) return 0;
  at += strlen(mark);
  for (; index && at; --index) at = strchr(at, ','), at = at ? at + 1 : at;
  return at ? atoi(at) : 0;
}

int cuFuncGetAttribute(int *value, int attribute, Function *function) {
  int status = in_context("cuFuncGetAttribute");
  /* CU_FUNC_ATTRIBUTE_NUM_REGS, _LOCAL_SIZE_BYTES and _SHARED_SIZE_BYTES. */
  int index = attribute == 4 ? 0 : attribute == 3 ? 1 : attribute == 1 ? 2 : -1;
  if (!status && index < 0) status = INVALID_VALUE;
  if (!status) *value = property_of(function, index);
  return said(status, "cuFuncGetAttribute", "\"attribute\": %d", attribute);
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Function *function, int threads,
                                                size_t shared) {
  int status = in_context("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  if (!status) *blocks = property_of(function, 3);
  return said(status, "cuOccupancyMaxActiveBlocksPerMultiprocessor",
              "\"threads\": %d, \"shared\": %zu", threads, shared);
}

/* The arguments, copied as at the call; the kernel runs when something waits for the stream. */
static int start(Function *function, const unsigned *grid, unsigned threads, unsigned shared,
                 Stream *stream, void **arguments) {
  Runner *runner = function->module->runner;
  Work work = {.stream = stream, .kind = KERNEL, .runner = runner, .grid = {grid[0], grid[1], grid[2]},
               .threads = threads, .shared = shared};
  if (!arguments || *runner->count > MOST_ARGUMENTS) return INVALID_VALUE;
  if (setting("RECORDING_EXACT", 0) && pointers_in(arguments) != (long)*runner->count)
    return INVALID_VALUE;
  for (uint32_t i = 0; i < *runner->count; ++i) memcpy(work.values[i], arguments[i], runner->sizes[i]);
  if (!stream || stream->state == NOT_CAPTURING) add_work(work);
  return OK;
}

int cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                   unsigned threads_y, unsigned threads_z, unsigned shared, Stream *stream,
                   void **arguments, void **extra) {
  int status = in_context("cuLaunchKernel");
  if (!status && function->module->context != current) status = INVALID_HANDLE;
  if (!status) {
    int capability = gpus[current->device];
    int reserved = capability >= 90 ? RESERVED_SHARED : 0;
    unsigned threads = threads_x * threads_y * threads_z;
    int small = shared + reserved <= USUAL_SHARED || (int)shared <= function->shared;
    if (!small || !threads || threads > 1024 || !x || !y || !z || y > 65535 || z > 65535 ||
        (!arguments && !extra))
      status = INVALID_VALUE;
  }
  if (!status) status = work_on(stream);
  if (!status && function->module->runner)
    status = start(function, (unsigned[]){x, y, z}, threads_x, shared, stream, arguments);
  return said(status, "cuLaunchKernel",
              "\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %zu, "
              "\"device\": %d",
              x, y, z, threads_x, threads_y, threads_z, shared, (size_t)stream,
              current ? current->device : -1);
}

int cuMemAlloc(void **address, size_t size) {
  int status = in_context("cuMemAlloc");
  if (!status) status = size ? during_capture() : INVALID_VALUE;
  if (!status && !(*address = new_block(size))) status = OUT_OF_MEMORY;
  return said(status, "cuMemAlloc", "\"bytes\": %zu", size);
}

/* Waits for all work, as the driver does. */
int cuMemFree(void *address) {
  int status = in_context("cuMemFree");
  if (!status) status = during_capture();
  if (!status) status = finish(NULL, 1, NULL);
  if (!status && !free_block(address)) status = INVALID_VALUE;
  return said(status, "cuMemFree", "");
}

/* `upload`: the host's bytes are read at the call. A copy in no stream is done at the call. */
static int copied(const char *name, void *target, void *source, size_t size, Stream *stream, int upload) {
  int status = in_context(name);
  if (!status && !block_with(upload ? target : source, size)) status = INVALID_VALUE;
  if (!status) status = work_on(stream);
  if (!status && (!stream || stream->state == NOT_CAPTURING)) {
    Work work = {.stream = stream, .kind = COPY, .target = target, .source = source, .size = size};
    if (upload) {
      work.source = memcpy(malloc(size ? size : 1), source, size);
      work.owned = 1;
    }
    add_work(work);
    if (!stream) status = finish(NULL, 0, NULL);
  }
  return said(status, name, "\"bytes\": %zu, \"stream\": %zu", size, (size_t)stream);
}

int cuMemcpyHtoD(void *target, void *source, size_t size) {
  return copied("cuMemcpyHtoD", target, source, size, NULL, 1);
}
int cuMemcpyHtoDAsync(void *target, void *source, size_t size, Stream *stream) {
  return copied("cuMemcpyHtoDAsync", target, source, size, stream, 1);
}
int cuMemcpyDtoHAsync(void *target, void *source, size_t size, Stream *stream) {
  return copied("cuMemcpyDtoHAsync", target, source, size, stream, 0);
}

int cuEventCreate(Event **event, unsigned flags) {
  int status = in_context("cuEventCreate");
  if (!status) *event = calloc(1, sizeof **event);
  return said(status, "cuEventCreate", "\"flags\": %u", flags);
}

int cuEventRecord(Event *event, Stream *stream) {
  int status = in_context("cuEventRecord");
  if (!status) status = work_on(stream);
  if (!status && (!stream || stream->state == NOT_CAPTURING)) {
    event->recorded = 1, event->done = 0;
    add_work((Work){.stream = stream, .kind = EVENT, .event = event});
  }
  return said(status, "cuEventRecord", "\"stream\": %zu", (size_t)stream);
}

int cuEventSynchronize(Event *event) {
  int status = in_context("cuEventSynchronize");
  for (Work *work = first_work; !status && work; work = work->next)
    if (work->kind == EVENT && work->event == event) {
      status = finish(work->stream, 0, event);
      break;
    }
  return said(status, "cuEventSynchronize", "");
}

/* A thousandth of a millisecond for each piece of work. */
int cuEventElapsedTime(float *milliseconds, Event *from, Event *to) {
  int status = in_context("cuEventElapsedTime");
  if (!status && !(from->recorded && to->recorded)) status = INVALID_HANDLE;
  if (!status && !(from->done && to->done)) status = NOT_READY;
  if (!status) *milliseconds = 0.001f * (float)(to->time - from->time);
  return said(status, "cuEventElapsedTime", "");
}

int cuEventDestroy(Event *event) {
  int status = in_context("cuEventDestroy");
  if (!status) status = finish(NULL, 1, NULL);
  free(event);
  return said(status, "cuEventDestroy", "");
}

int cuStreamCreate(Stream **stream, unsigned flags) {
  int status = in_context("cuStreamCreate");
  if (!status) {
    pthread_mutex_lock(&lock);
    *stream = malloc(sizeof **stream);
    **stream = (Stream){current, flags, NOT_CAPTURING, streams};
    streams = *stream;
    pthread_mutex_unlock(&lock);
  }
  return said(status, "cuStreamCreate", "\"flags\": %u", flags);
}

int cuStreamSynchronize(Stream *stream) {
  int status = in_context("cuStreamSynchronize");
  if (!status && stream && stream->state != NOT_CAPTURING) {
    stream->state = INVALIDATED;
    status = CAPTURE_UNSUPPORTED;
  }
  if (!status) status = finish(stream, 0, NULL);
  return said(status, "cuStreamSynchronize", "\"stream\": %zu", (size_t)stream);
}

int cuStreamBeginCapture(Stream *stream, int mode) {
  int status = in_context("cuStreamBeginCapture");
  if (!status && (!stream || stream->state != NOT_CAPTURING)) status = CAPTURE_UNSUPPORTED;
  if (!status) stream->state = CAPTURING;
  return said(status, "cuStreamBeginCapture", "\"mode\": %d", mode);
}

int cuStreamEndCapture(Stream *stream, void **graph) {
  int status = in_context("cuStreamEndCapture");
  if (!status && stream->state == INVALIDATED) status = CAPTURE_INVALIDATED;
  stream->state = NOT_CAPTURING;
  *graph = status ? NULL : stream;
  return said(status, "cuStreamEndCapture", "");
}

/* A driver has the functions of its CUDA version and of earlier versions. */
int cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *query) {
  (void)flags;
  Dl_info own;
  /* Look up the symbol in this library: another library may export the same name. */
  void *self = dladdr((void *)cuInit, &own) ? dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
  /* From CUDA 12.0 on, the name without a suffix means the second version. */
  if (!strcmp(symbol, "cuGetProcAddress") && version >= 12000) symbol = "cuGetProcAddress_v2";
  *address = self && version <= driver_version() ? dlsym(self, symbol) : NULL;
  if (query) *query = *address ? 0 : 1;
  return *address ? OK : NOT_FOUND;
}

int cuGetProcAddress(const char *symbol, void **address, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, address, version, flags, NULL);
}

/* NVRTC requests private tables but works without them. */
int cuGetExportTable(const void **table, const void *id) {
  (void)id;
  *table = NULL;
  return NOT_FOUND;
}
