// A launch of the emulator: host threads that take its blocks one after the other, each with stacks that are kept for the next launch, and what ends a
// block from outside: an access that is no access, and a limit of time.
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <thread>

#include "machine.h"

namespace emulator {

struct sigaction previous_fault[2], previous_limit;

void on_fault(int number, siginfo_t* info, void*) {
  if (!block) {  // not ours
    sigaction(number, &previous_fault[number == SIGBUS], nullptr);
    return;  // the instruction faults again
  }
  char* at = static_cast<char*>(info->si_addr);
  Machine& m = *block->machine;
  char *shared_end = block->shared + block->launch->shared, *pages = m.shared_pages, *after = pages + kGuard + kSharedPages;
  if (current && at >= m.stacks && at < m.stacks + kMaxThreads * kStack) escape("stack overflow");
  if (at >= after && at < after + kGuard)
    escape("access %ld bytes past the end of shared memory (%ld bytes)", (long)(at - shared_end), (long)block->launch->shared);
  if (at >= pages && at < pages + kGuard) escape("access %ld bytes before shared memory", (long)(block->shared - at));
  escape("access to memory that does not exist (%p), or a misaligned one", (void*)at);
}

void on_limit(int) {
  if (block) escape("no end after %g s", block->launch->limit);
}

std::mutex pool_mutex;
std::vector<Machine*> pool;

char* map(size_t size) {
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return static_cast<char*>(p);
}

Machine* take_machine() {
  {
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (!pool.empty()) {
      Machine* m = pool.back();
      pool.pop_back();
      return m;
    }
  }
  Machine* m = new Machine;
  m->stacks = map(kMaxThreads * kStack);
  m->fibers.resize(kMaxThreads);
  m->warps.resize(kMaxThreads / 32);
  for (int i = 0; i < kMaxThreads; i++) {
    m->fibers[i].stack = m->stacks + i * kStack;
    mprotect(m->fibers[i].stack, kPage, PROT_NONE);
  }
  m->shared_pages = map(kSharedPages + 2 * kGuard);
  mprotect(m->shared_pages, kGuard, PROT_NONE);
  mprotect(m->shared_pages + kGuard + kSharedPages, kGuard, PROT_NONE);
  m->signal_stack = map(64 << 10);
  return m;
}

void work(Launch& launch) {
  Machine* machine = take_machine();
  stack_t mine = {}, before = {};
  mine.ss_sp = machine->signal_stack;
  mine.ss_size = 64 << 10;
  sigaltstack(&mine, &before);
  for (int64_t i; !launch.failed && (i = launch.next++) < launch.grid;) run_block(launch, *machine, launch.order[i]);
  sigaltstack(&before, nullptr);
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(machine);
}

// Interrupts the workers once the launch has taken too long.
struct Watch {
  std::vector<pthread_t> workers;
  std::mutex mutex;
  std::condition_variable over;
  bool done = false;
  std::thread thread;
  Watch(Launch& launch, std::vector<pthread_t> threads) : workers(std::move(threads)) {
    thread = std::thread([this, &launch] {
      std::unique_lock<std::mutex> lock(mutex);
      auto limit = std::chrono::duration<double>(launch.limit);
      if (over.wait_for(lock, limit, [this] { return done; })) return;
      do {  // again for a worker that was between two blocks
        for (pthread_t worker : workers) pthread_kill(worker, SIGUSR2);
      } while (!over.wait_for(lock, std::chrono::milliseconds(200), [this] { return done; }));
    });
  }
  ~Watch() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      done = true;
    }
    over.notify_one();
    thread.join();
  }
};

}  // namespace emulator

using namespace emulator;

// Runs every block of the grid. Returns 0, or 1 with a text in `error`.
extern "C" __attribute__((visibility("default"))) int emulator_launch(const Kernel* kernel, int64_t grid, int threads, int64_t shared,
                                                                      const void* params, int64_t params_size, uint64_t seed, int workers,
                                                                      double limit, char* error, int64_t error_size) {
  auto refused = [&](const char* what) {
    snprintf(error, error_size, "%s: %s", kernel->name, what);
    return 1;
  };
  if (params_size != kernel->params_size) return refused("the struct has another size in Python than in the kernel");
  if (threads < 32 || threads % 32 || threads > kernel->threads || threads > kMaxThreads)
    return refused("threads must be a multiple of 32 within the kernel's bound");
  if (shared < 0 || shared > (int64_t)kSharedLimit) return refused("more shared memory than any device has");
  if (grid < 1 || grid > 0x7fffffff) return refused("grid must be in 1..2147483647");
  Launch launch;
  launch.kernel = kernel;
  launch.grid = grid;
  launch.shared = shared;
  launch.threads = threads;
  launch.params = params;
  launch.seed = seed;
  launch.limit = limit;
  launch.order.resize(grid);
  for (int64_t i = 0; i < grid; i++) launch.order[i] = i;
  for (int64_t i = grid - 1; i > 0; i--) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(launch.order[i], launch.order[(seed >> 33) % (i + 1)]);
  }
#if !SANITIZED  // AddressSanitizer tells more about a fault than we can
  struct sigaction fault = {}, late = {};
  fault.sa_sigaction = on_fault;
  fault.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &fault, &previous_fault[0]);
  sigaction(SIGBUS, &fault, &previous_fault[1]);
  late.sa_handler = on_limit;
  late.sa_flags = SA_ONSTACK;
  sigaction(SIGUSR2, &late, &previous_limit);
#endif
  {
    std::vector<std::thread> others;
    std::vector<pthread_t> ids = {pthread_self()};
    for (int i = 1; i < std::min<int64_t>(workers, grid); i++) {
      others.emplace_back([&] { work(launch); });
      ids.push_back(others.back().native_handle());
    }
#if !SANITIZED
    Watch watch(launch, ids);
#endif
    work(launch);
    for (std::thread& t : others) t.join();
  }
#if !SANITIZED
  sigaction(SIGSEGV, &previous_fault[0], nullptr);
  sigaction(SIGBUS, &previous_fault[1], nullptr);
  sigaction(SIGUSR2, &previous_limit, nullptr);
#endif
  if (!launch.failed) return 0;
  snprintf(error, error_size, "%s", launch.error.c_str());
  return 1;
}
