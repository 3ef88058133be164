"""An interpreter of the PTX that Triton and Gluon make for Hopper: one program (CTA) at a time, on the CPU, in numpy.

It runs the compiled text itself: registers of 32 lanes per warp, warps that block on barriers, matrix products that read
shared memory by descriptors and swizzles, tensor-memory copies by boxes that count bytes on barriers. What the hardware
may do late is done as late as allowed, and what would be a race on a GPU is a named error here (errors.py).

    parse.py        text to instructions
    lanes.py        arithmetic of 32 lanes
    memory.py       shared memory with its hazards, global memory with its bounds
    barriers.py     mbarriers with phases and bytes, named barriers with counts
    tensor_core.py  wgmma: descriptors, swizzles, fragments
    copies.py       tensor maps, bulk copies and reductions, cp.async
    operands.py     operands of instructions
    operations.py   every instruction that is not arithmetic, by name; memory, shuffles
    asynchronous.py instructions for barriers, fences, copies, products
    machine.py      warps, divergence, the scheduler
    cases.py        small calls of the project's kernels
    compile.py      compiles their launches in a process of its own
    launches.py     a launch bound to its compiled kernel, and run

Not modelled: clusters, time, registers of the real allocation (setmaxnreg is ignored), races between ordinary loads and
stores of different warps other than by the order in which the scheduler happens to run them, and the rounding inside a
tensor core's accumulation.
"""
