__version__ = "0.1.0"

# bitsandbytes says at every import (peft imports it) that it found no 4-bit kernels for CPUs; nothing here computes in 4 bits on a CPU
import logging
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
