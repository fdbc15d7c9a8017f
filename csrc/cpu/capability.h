// Which instruction set's kernels run. The kernel files are compiled once per instruction set; the
// best one that the machine runs is chosen when the library is loaded.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/merge_kernel.h"

namespace flashinfer_ops {

struct CpuKernels {
  const AttentionKernel* attention;
  const MergeKernel* merge;
};

const CpuKernels& cpu_kernels();

}  // namespace flashinfer_ops
