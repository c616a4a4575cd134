/* Memory with guard bytes, work that waits for a synchronisation, and kernels of the PTX runner.

   Device memory is host memory between guard bytes. Freed memory stays allocated and forbidden. Work in
   a stream is done when something waits for it: a result that is read too early is not there yet. */

enum { GUARD = 256, GUARD_BYTE = 0xfd, FRESH_BYTE = 0xcd, FREED_BYTE = 0xdd };
enum { ILLEGAL_ADDRESS = 700, NOT_READY = 600, MOST_ARGUMENTS = 64, MOST_ARGUMENT_BYTES = 16 };

typedef struct Block { unsigned char *start; size_t size; int live; struct Block *next; } Block;
typedef struct Runner {
  int (*run)(void **, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, int);
  void (*allow)(const char *, uint64_t, uint64_t, int);
  void (*forget)(void);
  const char *(*fault)(void);
  const uint32_t *sizes, *count;
} Runner;
typedef struct Work {
  struct Stream *stream;
  enum { COPY, KERNEL, EVENT } kind;
  void *target, *source;          /* COPY; `source` of an upload is a copy of the host's bytes. */
  size_t size;
  Runner *runner;                 /* KERNEL. */
  uint32_t grid[3], threads, shared;
  unsigned char values[MOST_ARGUMENTS][MOST_ARGUMENT_BYTES];
  struct Event *event;            /* EVENT. */
  int owned;                      /* Whether `source` is to be freed. */
  struct Work *next;
} Work;
typedef struct Event { int recorded, done; uint64_t time; } Event;

static Block *blocks;
static Work *first_work;
static uint64_t work_done;
static int failed; /* Sticky, as after an illegal address: the context is lost. */
static int seed;

static int said(int status, const char *name, const char *format, ...);

static Block *block_with(const void *address, size_t size) {
  const unsigned char *at = address;
  for (Block *b = blocks; b; b = b->next)
    if (b->live && at >= b->start && at + size <= b->start + b->size) return b;
  return NULL;
}

static void *new_block(size_t size) {
  unsigned char *all = NULL;
  if (posix_memalign((void **)&all, GUARD, size + 2 * GUARD)) return NULL;
  memset(all, GUARD_BYTE, size + 2 * GUARD);
  memset(all + GUARD, FRESH_BYTE, size);
  Block *block = malloc(sizeof *block);
  *block = (Block){all + GUARD, size, 1, blocks};
  blocks = block;
  return block->start;
}

static int guards_hold(const Block *block) {
  for (int i = 1; i <= GUARD; ++i)
    if (block->start[-i] != GUARD_BYTE || block->start[block->size + i - 1] != GUARD_BYTE) return 0;
  return 1;
}

/* Whether the address is the start of live memory, which is forbidden from now on. */
static int free_block(void *address) {
  for (Block *b = blocks; b; b = b->next)
    if (b->live && b->start == address) {
      if (!guards_hold(b)) said(0, "guard bytes are overwritten", "\"bytes\": %zu", b->size);
      memset(b->start, FREED_BYTE, b->size);
      b->live = 0;
      return 1;
    }
  return 0;
}

/* The runner that a module's image names after a mark; NULL: its kernels do nothing. */
static Runner *runner_of(const char *image, size_t size) {
  static const char mark[] = "PTX-RUNNER:";
  const char *at = memmem(image, size, mark, strlen(mark));
  if (!at) return NULL;
  void *library = dlopen(at + strlen(mark), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    said(INVALID_IMAGE, "dlopen", "\"text\": \"%s\"", dlerror());
    return NULL;
  }
  Runner *runner = malloc(sizeof *runner);
  *(void **)&runner->run = dlsym(library, "ptx_run");
  *(void **)&runner->allow = dlsym(library, "ptx_allow");
  *(void **)&runner->forget = dlsym(library, "ptx_forget");
  *(void **)&runner->fault = dlsym(library, "ptx_fault");
  runner->sizes = dlsym(library, "ptx_parameters");
  runner->count = dlsym(library, "ptx_parameter_count");
  return runner;
}

/* Number of pointers in an array that ctypes made under PYTHONMALLOC=debug, whose allocator writes the
   size, a letter and seven guard bytes before each block; -1: another allocator. */
static long pointers_in(void **array) {
  const unsigned char *at = (const unsigned char *)array;
  for (int i = 1; i < 8; ++i)
    if (at[-i] != 0xfd) return -1;
  uint64_t size = 0;
  for (int i = 16; i > 8; --i) size = size << 8 | at[-i];
  return (long)(size / sizeof(void *));
}

/* A fault that RECORDING_PLANT asks for, in the output of a kernel whose last argument is a pointer: it
   is the product, and the pointer is the output. */
static void plant(Work *work) {
  static int products;
  const char *fault = getenv("RECORDING_PLANT");
  uint32_t last = *work->runner->count - 1;
  if (!fault || work->runner->sizes[last] != sizeof(void *)) return;
  unsigned char *out = *(unsigned char **)work->values[last];
  ++products;
  if (!strcmp(fault, "value")) out[11] ^= 0x40;
  if (!strcmp(fault, "outside")) out[-3] ^= 0x40;
  if (!strcmp(fault, "moving") && products % 2) out[11] ^= 0x40;
  if (!strcmp(fault, "hang")) for (;;) pause();
  if (!strcmp(fault, "crash")) abort();
  if (!strcmp(fault, "address")) failed = ILLEGAL_ADDRESS;
}

static void run_kernel(Work *work) {
  void *values[MOST_ARGUMENTS];
  for (int i = 0; i < MOST_ARGUMENTS; ++i) values[i] = work->values[i];
  Runner *runner = work->runner;
  runner->forget();
  for (Block *b = blocks; b; b = b->next)
    if (b->live) {
      char name[60];
      snprintf(name, sizeof name, "an allocation of %zu bytes", b->size);
      runner->allow(name, (uint64_t)b->start, b->size, 1);
    }
  int bad = runner->run(values, work->grid[0], work->grid[1], work->grid[2], work->threads,
                        work->shared, seed++);
  if (!bad) plant(work);
  if (!bad) return;
  failed = ILLEGAL_ADDRESS;
  said(failed, "fault", "\"text\": \"%s\"", runner->fault());
}

static void do_work(Work *work) {
  ++work_done;
  if (failed) return;
  if (work->kind == COPY) memcpy(work->target, work->source, work->size);
  if (work->kind == KERNEL) run_kernel(work);
  if (work->kind == EVENT) work->event->done = 1, work->event->time = work_done;
}

static void add_work(Work work) {
  Work *made = malloc(sizeof *made), **end = &first_work;
  *made = work;
  made->next = NULL;
  pthread_mutex_lock(&lock);
  while (*end) end = &(*end)->next;
  *end = made;
  pthread_mutex_unlock(&lock);
}

/* Do what a stream has to do, up to an event if there is one; `all`: what every stream has to do. */
static int finish(struct Stream *stream, int all, const Event *until) {
  pthread_mutex_lock(&lock);
  for (Work **at = &first_work; *at;) {
    Work *work = *at;
    if (!all && work->stream != stream) {
      at = &work->next;
      continue;
    }
    *at = work->next;
    do_work(work);
    int last = work->kind == EVENT && work->event == until;
    if (work->owned) free(work->source);
    free(work);
    if (last) break;
  }
  pthread_mutex_unlock(&lock);
  return failed;
}

static long unfinished(void) {
  long count = 0;
  for (Work *work = first_work; work; work = work->next) ++count;
  return count;
}

/* What is left when the process ends. */
__attribute__((destructor)) static void record_the_end(void) {
  size_t live = 0;
  int broken = 0;
  for (Block *b = blocks; b; b = b->next)
    if (b->live) ++live, broken += !guards_hold(b);
  said(0, "end", "\"unfinished\": %ld, \"live\": %zu, \"broken guards\": %d, \"pushed\": %d",
       unfinished(), live, broken, pushed_contexts);
}
