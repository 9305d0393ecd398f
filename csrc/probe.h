// What the machine can do at this moment, to state a speed as a share of it.
#pragma once

#include "kernel_table.h"
#include "thread_pool.h"

namespace bitdistill {

// GB/s of reading memory, one large sequential stream a thread.
double probe_bandwidth(const KernelTable& room, size_t threads, double seconds);
// 10^9 multiply-adds a second of the room's widest int8 dot product, on registers.
double probe_int8(const KernelTable& room, size_t threads, double seconds);

}  // namespace bitdistill
