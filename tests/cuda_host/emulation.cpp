// Runs the threads of a CUDA block as fibers of one operating-system thread, in an order that the caller chooses.
//
// A fiber runs until it waits. Then the next runnable lane of its warp runs, and only when none is left the next warp:
// warps run as far ahead of each other as the barriers let them, which is what makes a missing barrier show. Within a
// warp the lanes take turns, so that reliance on lockstep shows too.
//
// Under ThreadSanitizer (EMULATION_TSAN; compile the kernels with -fsanitize=thread, but not this file) each fiber is a
// thread, and only __syncthreads and __syncwarp order memory: as CUDA says, shuffles do not.
#include "emulation.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#ifdef EMULATION_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void* __tsan_get_current_fiber() { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned WARP = 32, MAX_THREADS = 1024, NO_SYNC = 1;
constexpr size_t STACK_BYTES = 128 << 10;

enum class Call { NONE, SYNCTHREADS, SYNCWARP, SHUFFLE };

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  Call call = Call::NONE;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][WARP];  // two, taken in turn: a lane may enter its next shuffle while others read this one's
};

struct Fiber {
  ucontext_t context;
  void* sanitizer = nullptr;
  bool made = false, done = true;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;  // of `waits_for` when the fiber came
};

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
Barrier block_barrier;
char start_of_block, end_of_block;  // addresses for ThreadSanitizer
ucontext_t host;
void* host_sanitizer;
char* stacks;
unsigned current, alive, order_kind;
std::vector<unsigned> warp_order, lane_order, place_of_warp, place_of_lane;
void (*kernel_body)(void*);
void* kernel_context;
cudaError_t last_error = cudaSuccess;

// Numbers below `count` in the chosen order: 0 forwards, 1 backwards, 2 odd ones first, above: shuffled by that seed.
std::vector<unsigned> arrange(unsigned count, unsigned seed) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (order_kind == 1) {
    for (unsigned i = 0; i < count; ++i) order[i] = count - 1 - i;
  } else if (order_kind == 2) {
    for (unsigned i = 0; i < count; ++i) order[i] = i < count / 2 ? 2 * i + 1 : 2 * (i - count / 2);
  } else if (order_kind > 2) {
    uint64_t state = seed * 0x9E3779B97F4A7C15u + order_kind;
    for (unsigned i = count; i > 1; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i - 1], order[(state >> 33) % i]);
    }
  }
  return order;
}

std::vector<unsigned> inverse(const std::vector<unsigned>& order) {
  std::vector<unsigned> places(order.size());
  for (unsigned i = 0; i < order.size(); ++i) places[order[i]] = i;
  return places;
}

void to_host() {
  __tsan_switch_to_fiber(host_sanitizer, NO_SYNC);
  swapcontext(&fibers[current].context, &host);
}

// Fibers stay where they are, and are made anew for the next launch.
void fail(const char* message) {
  std::fprintf(stderr, "emulation: block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, current, message);
  last_error = cudaErrorLaunchFailure;
  for (Fiber& fiber : fibers) fiber.made = false;
  to_host();
  std::abort();
}

bool runnable(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || fiber.waits_for->generation != fiber.generation);
}

// The thread to run after `current`, or MAX_THREADS.
unsigned next() {
  const unsigned warp_count = warp_order.size(), lanes = lane_order.size();
  const unsigned first_warp = place_of_warp[current / WARP], first_lane = place_of_lane[current % WARP] + 1;
  for (unsigned i = 0; i <= warp_count; ++i) {
    const unsigned warp = warp_order[(first_warp + i) % warp_count], start = i == 0 ? first_lane : 0;
    for (unsigned j = 0; j < lanes; ++j) {
      const unsigned thread = warp * WARP + lane_order[(start + j) % lanes];
      if (thread < blockDim.x && runnable(fibers[thread])) return thread;
    }
  }
  return MAX_THREADS;
}

// Lets another thread run until this one is runnable again.
void yield() {
  const unsigned from = current, to = next();
  if (to == MAX_THREADS && alive > 0) fail("all threads wait for others that have left or wait elsewhere");
  if (to == MAX_THREADS) return to_host();
  if (to == from) return;
  current = to;
  threadIdx.x = to;
  __tsan_switch_to_fiber(fibers[to].sanitizer, NO_SYNC);
  swapcontext(&fibers[from].context, &fibers[to].context);
}

void wait_at(Barrier& barrier, Call call) {
  if (barrier.arrived > 0 && barrier.call != call) fail("a lane waits in another call than its warp");
  barrier.call = call;
  Fiber& fiber = fibers[current];
  if (call != Call::SHUFFLE) __tsan_release(&barrier);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    fiber.waits_for = &barrier;
    fiber.generation = barrier.generation;
    yield();
    fiber.waits_for = nullptr;
  }
  if (call != Call::SHUFFLE) __tsan_acquire(&barrier);
}

void require_full_warp(unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("only full masks are emulated");
  if (warps[current / WARP].barrier.expected != WARP) fail("a full mask in a warp that is not full");
}

// A fiber's life: one thread of one block after the other.
void live() {
  for (;;) {
    __tsan_acquire(&start_of_block);
    kernel_body(kernel_context);
    __tsan_release(&end_of_block);
    fibers[current].done = true;
    --alive;
    yield();
  }
}

void make(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + thread * STACK_BYTES;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, live, 0);
  if (fiber.sanitizer == nullptr) fiber.sanitizer = __tsan_create_fiber(0);
  fiber.made = true;
}

// This library's thread-local memory: the kernels' shared arrays.
struct SharedMemory {
  char* begin = nullptr;
  size_t bytes = 0;
} shared_memory;

thread_local char first_use;  // the loader makes a library's block when something in it is first used

int find_shared_memory(dl_phdr_info* info, size_t, void*) {
  const auto own = reinterpret_cast<uintptr_t>(&find_shared_memory);
  bool is_this_library = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && own >= start && own < start + header.p_memsz) is_this_library = true;
    if (header.p_type == PT_TLS) bytes = header.p_memsz;
  }
  if (is_this_library) shared_memory = {static_cast<char*>(info->dlpi_tls_data), bytes};
  return is_this_library;
}

void run_block(unsigned threads, unsigned seed) {
  if (shared_memory.begin != nullptr) std::memset(shared_memory.begin, 0xFF, shared_memory.bytes);
  warp_order = arrange((threads + WARP - 1) / WARP, seed);
  lane_order = arrange(WARP, seed + 1);
  place_of_warp = inverse(warp_order);
  place_of_lane = inverse(lane_order);
  block_barrier = {threads};
  for (unsigned warp = 0; warp * WARP < threads; ++warp) {
    warps[warp].barrier = {threads - warp * WARP < WARP ? threads - warp * WARP : WARP};
  }
  for (unsigned thread = 0; thread < threads; ++thread) {
    if (!fibers[thread].made) make(thread);
    fibers[thread].done = false;
    fibers[thread].waits_for = nullptr;
  }
  alive = threads;
  current = warp_order[0] * WARP;
  for (unsigned lane : lane_order) {
    if (warp_order[0] * WARP + lane < threads) {
      current = warp_order[0] * WARP + lane;
      break;
    }
  }
  threadIdx = dim3(current, 0, 0);
  __tsan_release(&start_of_block);
  __tsan_switch_to_fiber(fibers[current].sanitizer, NO_SYNC);
  swapcontext(&host, &fibers[current].context);
  __tsan_acquire(&end_of_block);
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

void __syncthreads() { wait_at(block_barrier, Call::SYNCTHREADS); }

void __syncwarp(unsigned mask) {
  require_full_warp(mask);
  wait_at(warps[current / WARP].barrier, Call::SYNCWARP);
}

unsigned emulation::lane() { return threadIdx.x % WARP; }

uint64_t emulation::exchange(unsigned mask, uint64_t value, unsigned source) {
  require_full_warp(mask);
  Warp& warp = warps[current / WARP];
  uint64_t* const values = warp.values[warp.barrier.generation % 2];
  values[current % WARP] = value;
  wait_at(warp.barrier, Call::SHUFFLE);
  return values[source];
}

void emulation::run(dim3 grid, unsigned threads, void (*body)(void*), void* context) {
  const bool fits = grid.x > 0 && grid.x <= 0x7FFFFFFFu && grid.y > 0 && grid.y <= 65535u && grid.z == 1;
  if (!fits || threads == 0 || threads > MAX_THREADS) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (stacks == nullptr) {
    void* const memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(memory);
    host_sanitizer = __tsan_get_current_fiber();
    *const_cast<volatile char*>(&first_use) = 1;
    dl_iterate_phdr(find_shared_memory, nullptr);
  }
  kernel_body = body;
  kernel_context = context;
  gridDim = grid;
  blockDim = dim3(threads);
  const uint64_t blocks = uint64_t(grid.x) * grid.y;
  for (uint64_t i = 0; i < blocks && last_error == cudaSuccess; ++i) {
    const uint64_t block = order_kind == 1 ? blocks - 1 - i : i;
    blockIdx = dim3(unsigned(block % grid.x), unsigned(block / grid.x), 0);
    run_block(threads, unsigned(i));
  }
}

// For the tests: the order of warps and lanes, and memory that ends where the tensor ends, for AddressSanitizer.
extern "C" void emulation_order(unsigned kind) { order_kind = kind; }
extern "C" void* emulation_allocate(size_t bytes) { return std::malloc(bytes); }
extern "C" void emulation_free(void* address) { std::free(address); }
