// The fibers behind emulation.h. x86-64, Linux. The thread sanitizer does not look at this file, which is the order of
// the threads and no part of their work; it only learns of the fibers.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif
#if defined(SEGADAPT_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // flag 1: the switch itself orders no memory
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

// Saves what a call must preserve on the stack of *from and continues on that of to.
extern "C" void segadapt_switch_stack(void** from, void* to);
asm(R"(
.text
.globl segadapt_switch_stack
.type segadapt_switch_stack, @function
segadapt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size segadapt_switch_stack, .-segadapt_switch_stack
)");

namespace emulated {

Place place;
void* shared_memory;

namespace {

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  State state;
  int line;       // of the barrier or primitive it waits at
  unsigned mask;  // of the lanes it waits for
  uint64_t offer;
  void* stack_pointer;
  char* stack = nullptr;
  void* tsan;
};

constexpr size_t kStackBytes = 256 << 10;
constexpr int64_t kMaxThreads = 1024, kMaxSharedBytes = 48 << 10;

enum class Order { forward, reverse, shuffled } order = Order::forward;
std::mt19937 generator;

Fiber fibers[kMaxThreads];
int size, running;  // threads of the block; the one that runs
const char* kernel_name;
void (*body)(void*);
void* arguments;
void* scheduler_stack_pointer;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom;
size_t scheduler_bytes;
#endif
#if defined(SEGADAPT_THREAD_SANITIZER)
void* scheduler_tsan;
char launched, synchronised, left;  // addresses that stand for an order: launch, barrier, end of a thread
void acquire(void* address) { __tsan_acquire(address); }
void release(void* address) { __tsan_release(address); }
#else
char launched, synchronised, left;
void acquire(void*) {}
void release(void*) {}
#endif

void resume(int t) {
  running = t;
  place.thread = {unsigned(t), 0, 0};
  Fiber& fiber = fibers[t];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
#if defined(SEGADAPT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
  segadapt_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void back_to_scheduler() {
  Fiber& fiber = fibers[running];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fake, scheduler_bottom, scheduler_bytes);
#endif
#if defined(SEGADAPT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
  segadapt_switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_bytes);
#endif
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
  acquire(&launched);
  acquire(&fibers[running]);
  body(arguments);
  release(&left);
  release(&fibers[running]);  // whoever gets this stack next
  fibers[running].state = State::done;
  back_to_scheduler();
  std::abort();  // nobody resumes it
}

void start(Fiber& fiber) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stack of a thread");
    fiber.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // the frames of the thread before, which never returned
#endif
#if defined(SEGADAPT_THREAD_SANITIZER)
  fiber.tsan = __tsan_create_fiber(0);
#endif
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // the caller of thread_main, and the alignment that a call leaves
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.state = State::ready;
}

[[noreturn]] void fail_at(int t, const char* what) {
  place.thread.x = unsigned(t);
  fail(what);
}

// Lets the lanes go on whose whole mask has arrived; whether there were any.
bool release_warp(int first) {
  for (int t = first; t < std::min(first + 32, size); ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.state != State::at_warp) continue;
    bool complete = true;
    for (int l = 0; l < 32; ++l) {
      if (!(fiber.mask >> l & 1)) continue;
      if (first + l >= size) fail_at(t, "a mask names a lane that the block does not have");
      const Fiber& other = fibers[first + l];
      if (other.state == State::done) fail_at(t, "a mask names a lane that has left the kernel");
      complete &= other.state == State::at_warp;
      if (other.state == State::at_warp && (other.line != fiber.line || other.mask != fiber.mask)) {
        fail_at(t, "lanes of one mask wait at different warp primitives");
      }
    }
    if (!complete) continue;
    const unsigned mask = fiber.mask;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) fibers[first + l].state = State::ready;
    }
    return true;
  }
  return false;
}

// Opens __syncthreads once everybody who is still there has arrived.
void release_block() {
  int line = 0;
  for (int t = 0; t < size; ++t) {
    Fiber& fiber = fibers[t];
    if (fiber.state == State::done) continue;
    if (fiber.state != State::at_block) fail_at(t, "waits for lanes that do not come");
    if (line && fiber.line != line) fail_at(t, "threads wait at different __syncthreads");
    line = fiber.line;
  }
  for (int t = 0; t < size; ++t) {
    if (fibers[t].state == State::at_block) fibers[t].state = State::ready;
  }
}

template <class T>
void arrange(std::vector<T>& items) {
  if (order == Order::reverse) std::reverse(items.begin(), items.end());
  if (order == Order::shuffled) std::shuffle(items.begin(), items.end(), generator);
}

bool sweep() {
  std::vector<int> ready;
  for (int t = 0; t < size; ++t) {
    if (fibers[t].state == State::ready) ready.push_back(t);
  }
  arrange(ready);
  for (int t : ready) resume(t);
  return !ready.empty();
}

bool finished() {
  return std::all_of(fibers, fibers + size, [](const Fiber& fiber) { return fiber.state == State::done; });
}

void run_block() {
  for (int t = 0; t < size; ++t) start(fibers[t]);
  while (!finished()) {
    bool progress = sweep();
    for (int first = 0; first < size; first += 32) progress |= release_warp(first);
    if (!progress) release_block();
  }
#if defined(SEGADAPT_THREAD_SANITIZER)
  for (int t = 0; t < size; ++t) __tsan_destroy_fiber(fibers[t].tsan);
#endif
  acquire(&left);  // blocks share what stands for shared memory: races are looked for inside them, not between them
}

void check_launch(dim3 grid, dim3 block, size_t shared) {
  if (block.y != 1 || block.z != 1) fail("only one-dimensional blocks are emulated");
  if (block.x < 1 || block.x > kMaxThreads) fail("a block of no or of more than 1,024 threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) fail("an empty grid");
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("too large a grid");
  if (shared > kMaxSharedBytes) fail("more than 48 KB of shared memory");
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s, block (%u, %u), thread %u: %s\n", kernel_name, place.block.x, place.block.y,
               place.thread.x, what);
  std::fflush(stderr);
  std::abort();
}

void offer(uint64_t value) { fibers[running].offer = value; }

uint64_t offered_by(unsigned lane) { return fibers[running / 32 * 32 + lane].offer; }

void wait_for_block(int line) {
  Fiber& fiber = fibers[running];
  fiber.state = State::at_block, fiber.line = line;
  release(&synchronised);
  back_to_scheduler();
  acquire(&synchronised);
}

void wait_for_warp(unsigned mask, int line) {
  if (!(mask >> running % 32 & 1)) fail("a lane calls a warp primitive whose mask does not name it");
  Fiber& fiber = fibers[running];
  fiber.state = State::at_warp, fiber.line = line, fiber.mask = mask;
  back_to_scheduler();
}

void run_blocks(const char* kernel, dim3 grid, dim3 block, size_t shared, void (*run)(void*), void* values) {
  kernel_name = kernel, body = run, arguments = values;
  place = {};
  check_launch(grid, block, shared);
  size = int(block.x);
  place.block_size = {unsigned(block.x), 1, 1};
  place.grid_size = {unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)};
#if defined(SEGADAPT_THREAD_SANITIZER)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  release(&launched);
  std::vector<char> memory(shared);  // on the heap, where the address sanitizer sees its end
  shared_memory = memory.data();
  std::vector<int64_t> blocks(grid.x * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = int64_t(i);
  arrange(blocks);
  for (int64_t b : blocks) {
    place.block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    std::fill(memory.begin(), memory.end(), char(0xff));
    run_block();
  }
}

}  // namespace emulated

// The order in which threads run between waits, and blocks: 0 forward, 1 reverse, 2 shuffled. No result may depend on
// it.
extern "C" void segadapt_emulation_order(int order, unsigned seed) {
  emulated::order = static_cast<emulated::Order>(order);
  emulated::generator.seed(seed);
}
