// What the files of the emulator's sm_90 share: everything of a block that is under way, and what one file asks of another.
//
// Bulk copies and products are under way from their issue until the barrier's phase ends or wgmma_wait lets go. Under even seeds they happen as late
// as they may, when no thread can go on. Under odd ones each may happen at any change of threads, early or late by a rate drawn per block, and a
// product at the latest in the first wait. Until then the destination holds poison, which also shows whether anyone wrote to an accumulator since.
// A product is carried out warp by warp, 16 rows each: nothing holds the four warps together but what the kernel does.
#pragma once
#include <stdio.h>

#include <algorithm>
#include <deque>
#include <list>

#include "machine.h"
#include "runtime_sm90.h"

#define AT base_name(at.file), at.line

namespace emulator {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kNamedBarriers = 16;
constexpr int kMostBytes = (1 << 20) - 1;  // that a barrier can wait for
constexpr int kWatchedPage = 1024;

struct Barrier {
  uint32_t address;
  int count, missing;  // arrivals of a phase
  int64_t bytes;       // that the phase still waits for; below 0 where copies were faster than barrier_arrive_expect
  uint32_t phase;
  int owner;  // the thread that initialised it
  bool published;
  Site site;
  std::vector<int> waiting;
};

struct BulkCopy {
  uint32_t shared;
  int bytes;
  const void* global;
  Barrier* barrier;
  Site site;
};

struct NamedBarrier {
  int threads, arrived;  // 0 arrived: nobody uses it
  bool votes, value;
  uint32_t lanes[kMaxThreads / 32];
  std::vector<int> waiting;
};

struct Accumulator {
  Kind kind;
  int n, products;  // still under way
  char* c[32];
  std::vector<uint32_t> value;  // (16, n)
};

// A product as one warp carries it out.
struct Operation {
  Product product;
  int group;
  Site site;
  Accumulator* accumulator;
  const uint32_t* registers[32];
  uint32_t a[32][4];
};

struct WarpProducts {
  int last_group;
  Site last_site;
  std::vector<int> waiting;  // threads, in wgmma_wait
  std::deque<Operation> queue;
  std::list<Accumulator> accumulators;
};

// What all threads of a warpgroup must execute one after the other, each at its own time.
struct Step {
  Kind kind;
  Site site;        // none for a fence and a wait
  Product product;  // where it is one
  int number;       // of registers, or of groups that may be under way
  int missing;      // threads that have not come to it
};

struct Warpgroup {
  std::deque<Step> steps;  // that not all threads have come to
  int64_t passed;          // steps before them
  // The right operand of the last product that a warp carried out, as bytes and decoded: the other warps mostly find the same one.
  Kind kind;
  std::vector<uint8_t> bytes;
  std::vector<Eight> decoded;
};

// What a thread has named and what it has asked for.
struct Sums {
  const char* c;
  int bytes;
  int group;
  Site site;
};
struct Registers {
  int64_t step;               // of its warpgroup's, the next one
  std::vector<Named> fenced;  // since the last wgmma_wait
  std::vector<Sums> sums;     // of products that it has not let go of
};

// What a thread wrote to shared memory or read from it itself (its plain accesses) since its last fence_async.
struct Accesses {
  struct Range {
    uint32_t from;
    int bytes;
  };
  std::vector<Range> writes;
  std::vector<uint64_t> reads;  // a bit for each byte
  std::vector<uint32_t> read;   // words of `reads` that are not 0
};

struct Async {
  int rate;  // something under way ends at every how manieth change of threads
  std::deque<Barrier> barriers;
  std::vector<BulkCopy> copies;
  NamedBarrier named[kNamedBarriers];
  Warpgroup groups[kMaxThreads / kGroup];
  WarpProducts products[kMaxThreads / 32];
  Registers registers[kMaxThreads];
  int held[kMaxThreads / 32];      // registers of each thread of a warp
  int free;                        // that warps have given away
  std::vector<int> wanting;        // threads, in take_registers
  Accesses accesses[kMaxThreads];
  std::vector<uint16_t> unfenced;  // for each byte 1 + the thread that wrote it last and has not fenced since; 0: nobody
  std::vector<int> unfenced_in;    // bytes of each page of kWatchedPage
};

// The block's, made at the first use.
Async& async();
void wake(int thread);
// Lets others go first.
void rest(Fiber& me);

// sm90_barriers.cpp
void check_memory(const Barrier& b);
void land(Async& s, size_t i);

// sm90_products.cpp: carries out the oldest product of a warp. Where 16 bytes of a matrix lie: chunk 0 or 1 of the 32 bytes of a row.
void execute(int warp);
uint32_t place_in_matrix(const Operation& op, uint64_t descriptor, int row, int chunk);

// sm90_registers.cpp: a thread executes the next step of its warpgroup, which must be what the others execute.
void follow(const Step& step);
void check_steps_at_the_end();
int registers_at_start();

// sm90_watch.cpp: errors where an operand, or what a bulk copy writes over, was accessed plainly by a thread that has not fenced since.
void check_operand(const Operation& op, uint64_t descriptor, int rows);
void check_overwritten(const BulkCopy& copy);

}  // namespace emulator
