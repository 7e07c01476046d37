// Which instruction set the CPU kernels run on: the best one that this machine has and this build contains, unless told otherwise.
#pragma once

namespace modalign::cpu {

enum class InstructionSet { portable, avx2, avx512 };

InstructionSet instruction_set();                   // the one in use
const char* instruction_set_name();                 // "portable", "avx2", "avx512"
bool use_instruction_set(const char* name);         // false: not compiled or not supported by this machine; nullptr or "auto": the best
const char* compiled_instruction_sets();            // "portable avx2 avx512"

// One entry point per compiled set; `Kernels` is the family's table of functions.
template <class Kernels>
struct Variants {
  const Kernels* portable;
  const Kernels* avx2;      // nullptr where not compiled
  const Kernels* avx512;
  const Kernels& chosen() const {
    switch (instruction_set()) {
      case InstructionSet::avx512: return *avx512;
      case InstructionSet::avx2: return *avx2;
      default: return *portable;
    }
  }
};

}  // namespace modalign::cpu
