/// @file on_instruction_set.h
/// @brief CPU kernels on a named instruction set for the length of a scope.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/instruction_set.h"

namespace modalign::host {

/// While this lives CPU kernels run on `name`; after it, on what they ran on before. Raises ValueError where this machine cannot.
class OnInstructionSet {
public:
    explicit OnInstructionSet(const std::string& name) : before_(cpu::instruction_set_name()) {
        if (!cpu::use_instruction_set(name.c_str())) throw pybind11::value_error("_host: instruction_set must be one that this machine can run, got " + name);
    }
    ~OnInstructionSet() { cpu::use_instruction_set(before_.c_str()); }
    OnInstructionSet(const OnInstructionSet&) = delete;
    OnInstructionSet& operator=(const OnInstructionSet&) = delete;

private:
    std::string before_;
};

}  // namespace modalign::host
