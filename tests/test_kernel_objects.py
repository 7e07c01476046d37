"""Facts of the compiled GPU code, read from the cubins inside `_C.so`: registers, stack frames (where spills go), the instructions of main loops."""

import json
import os
import struct
from pathlib import Path

import pytest

PACKAGE = Path(os.environ.get("MODALIGN_PACKAGE", Path(__file__).parents[1] / "python" / "modalign"))   # `make wheel` has it look into the wheel, which holds all targets
VOLUME_KERNELS = 72  # instances of csrc/cuda/gram_volume.cuh with the shared ones of pair_gradient.cuh: 18 for each of four dtypes
LOSS_KERNELS = 80  # instances of csrc/cuda/contrastive_loss.cuh: 17 for each of four dtypes, 5 for float and double, 2 for half types
SEGMENT_KERNELS = 20  # instances of csrc/cuda/segment_max_similarity.cuh: 5 for each of four dtypes
STRUCTURE_KERNELS = 10  # instances of csrc/cuda/structure_loss.cuh: 5 for each of float and double
KNN_KERNELS = 25  # instances of csrc/cuda/knn.cuh: 4 for each of four dtypes, 3 for float and double, 3 for float as two planes
ATTENTION_KERNELS = 35  # instances of csrc/cuda/masked_attention.cuh: 8 for each of four dtypes, 3 for masks
DYNAMIC_MASK_KERNELS = 2  # instances of csrc/cuda/dynamic_mask.cuh: float and double
MATCH_KERNELS = 14  # instances of csrc/cuda/match_tokens.cuh: 2 for each of four dtypes, 2 for float and double, 2 for all
GROUP_KERNELS = 8  # instances of csrc/cuda/reduce_groups.cuh: 2 for each of four dtypes
SCORE_KERNELS = 8  # instances of csrc/cuda/attention_scores.cuh: 2 for each of four dtypes
REGISTERS = 65536  # of a multiprocessor
CUDA_MACHINE = 190  # e_machine of a cubin

# Low twelve bits of the 128-bit instruction words of sm_80 ... sm_90.
OPCODES = {0x223: "FFMA", 0x22B: "DFMA", 0x23C: "HMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0x387: "STL", 0x983: "LDL", 0xB1D: "BAR"}


THREAD_KERNELS = ("CountClasses", "FoldColumns", "FoldRows", "NarrowRows", "SumLogits", "CleanRows")  # 256 threads, one item each, or rows warp by warp


class Kernel:
    def __init__(self, name, code, registers, frame):
        self.name, self.registers, self.frame = name, registers, frame
        self.opcodes = [OPCODES.get(word & 0xFFF) for (word,) in struct.iter_unpack("<Q8x", code)]
        self.is_attention = any(f"Attention{one}Tiles" in name for one in ("Forward", "Gradient", "Bias"))   # several products in one kernel
        self.is_tile = "TileWalk" in name or "PairedProducts" in name or "AttentionScoreTiles" in name or "MatchScoreTiles" in name or self.is_attention
        self.is_double = "FmaBackendId" in name or "PairedProductsId" in name or "TilesId" in name
        self.planes = 3 if "Li2E" in name else 1   # products of planes for one product
        self.products = 1 if not self.is_attention else 3 if "AttentionGradientE0" in name or "AttentionGradientE1" in name else 2
        self.is_warp = not self.is_tile and not any(one in name for one in THREAD_KERNELS)   # a warp per item, in registers
        self.threads = 128 if self.is_warp else 256

    def count(self, opcode):
        return self.opcodes.count(opcode)

    def main_loops(self):
        """The instructions of a slab of each product, from the first to the last of its multiply-adds, those that lie closest together first."""
        opcode, per_slab = (
            ("HMMA", 32 * self.planes) if self.count("HMMA") else ("DFMA", 8 * 16) if self.is_double else ("FFMA", 8 * 64)
        )
        at = [i for i, o in enumerate(self.opcodes) if o == opcode]
        assert len(at) >= per_slab > 0, self.name
        loops = []
        while len(loops) < self.products:
            begin = min(range(len(at) - per_slab + 1), key=lambda i: at[i + per_slab - 1] - at[i])
            loops.append(self.opcodes[at[begin] : at[begin + per_slab - 1] + 1])
            at[begin : begin + per_slab] = []
        return loops


def strings(table, offset):
    return table[offset : table.index(b"\0", offset)].decode()


def attributes(data):
    """(attribute, value) of an .nv.info section."""
    at = 0
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:
            yield attribute, data[at : at + size]
            at += size


def cubins(path):
    """[(sm, {name: Kernel})] of a shared library or object."""
    data = path.read_bytes()
    found, at = [], -1
    while (at := data.find(b"\x7fELF", at + 1)) >= 0:
        header = struct.unpack_from("<16sHHIQQQIHHHHHH", data, at)
        if header[2] != CUDA_MACHINE:
            continue
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + header[6] + i * header[11]) for i in range(header[12])]
        content = [data[at + s[4] : at + s[4] + s[5]] if s[1] != 8 else b"" for s in sections]
        names = [strings(content[header[13]], s[0]) for s in sections]
        symbols, table = content[names.index(".symtab")], content[names.index(".strtab")]
        symbol = [strings(table, struct.unpack_from("<I", symbols, i)[0]) for i in range(0, len(symbols), 24)]
        registers, frames = {}, {}
        for attribute, value in attributes(content[names.index(".nv.info")]):
            if attribute in (0x2F, 0x11):
                index, number = struct.unpack("<II", value)
                (registers if attribute == 0x2F else frames)[symbol[index]] = number
        kernels = {}
        for name, code in zip(names, content, strict=True):
            if name.startswith(".text."):
                name = name.removeprefix(".text.")
                kernels[name] = Kernel(name, code, registers[name], frames.get(name, 0))
        found.append((header[7] >> 8 & 0xFF, kernels))
    return found


@pytest.fixture(scope="module")
def compiled():
    """[(sm, {name: Kernel})], the cubins of all .cu files of a target as one."""
    if json.loads((PACKAGE / "_build.json").read_text())["cuda"] is None:
        pytest.skip("this build was made without nvcc")
    targets = {}
    for sm, kernels in cubins(PACKAGE / "_C.so"):
        assert not targets.setdefault(sm, {}).keys() & kernels.keys(), "an instance was compiled twice"
        targets[sm].update(kernels)
    return list(targets.items())


def test_every_target_holds_every_instance(compiled):
    targets = json.loads((PACKAGE / "_build.json").read_text())["cuda_targets"]
    assert len(compiled) == len([target for target in targets if not target.endswith("-virtual")])
    for sm, kernels in compiled:
        assert 80 <= sm <= 90
        assert len([name for name in kernels if "modalign_kernel" in name]) == VOLUME_KERNELS + LOSS_KERNELS + SEGMENT_KERNELS + KNN_KERNELS + STRUCTURE_KERNELS + ATTENTION_KERNELS + SCORE_KERNELS + DYNAMIC_MASK_KERNELS + MATCH_KERNELS + GROUP_KERNELS


def test_registers_allow_the_planned_blocks(compiled):
    for _, kernels in compiled:
        for kernel in kernels.values():
            alone = "MmaBackendI13__nv_bfloat16Li2E" in kernel.name or ("CoefficientEpilogue" in kernel.name and "LossUpstreamId" in kernel.name)
            blocks = 9 if "ReduceGroups" in kernel.name or "SpreadGroups" in kernel.name else 3 if kernel.is_warp else 1 if alone or kernel.is_attention else 2
            assert kernel.registers <= 255 and kernel.registers * kernel.threads * blocks <= REGISTERS, (kernel.name, kernel.registers)


def test_nothing_is_spilled_in_main_loops(compiled):
    for _, kernels in compiled:
        for kernel in kernels.values():
            # A few words of epilogues and of the one-warp kernels; between the three products of attention's gradients, whose sums fill 192 registers, and where 128 registers ask masks, some more.
            frame = 144 if kernel.products == 3 or "AttentionBias" in kernel.name else 96 if "AttentionScore" in kernel.name else 32 if kernel.is_tile else 64
            assert kernel.frame <= frame, (kernel.name, kernel.frame)
            if kernel.is_tile:
                assert not any("LDL" in loop or "STL" in loop for loop in kernel.main_loops()), kernel.name


def test_main_loops_are_multiply_adds(compiled):
    """Tensor cores: HMMA fed by ldmatrix and asynchronous copies. Ordinary units: four of five instructions multiply-add (double: three of five)."""
    for _, kernels in compiled:
        for kernel in kernels.values():
            if not kernel.is_tile:
                continue
            loops = kernel.main_loops()
            if kernel.count("HMMA"):
                assert kernel.count("HMMA") == 32 * kernel.planes * kernel.products and kernel.count("LDSM") > 0 and kernel.count("LDGSTS") > 0, kernel.name
                assert kernel.count("FFMA") < 4096
            elif kernel.is_double:
                assert all(loop.count("DFMA") / len(loop) > 0.6 for loop in loops), (kernel.name, [loop.count("DFMA") / len(loop) for loop in loops])
            else:
                assert all(loop.count("FFMA") / len(loop) > 0.75 for loop in loops), (kernel.name, [loop.count("FFMA") / len(loop) for loop in loops])
