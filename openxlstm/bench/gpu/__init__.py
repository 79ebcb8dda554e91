"""What `make gpu` runs: parity on the device, then speed beside the peers, in one command of at most ten minutes.

    __main__   the command: stages in the order of their importance, each in a process of its own
    stage      one stage: says what it finds, a JSON line at a time
    device     the device, its clock, its ceilings
    parity     every launch configuration against the definition in float64
    kernels    rows of the cells and of the decoding step
    models     a training step, decoding by a CUDA graph, bf16 on the GPU beside fp32 on the CPU
    peers      other people's kernels, or the reason why one is not there
    report     what was found, on disk from the first line on, and its part of docs/performance.md

On `--device cpu` the same code runs at tiny shapes under Triton's interpreter: a test of the program, not of a device.
"""
