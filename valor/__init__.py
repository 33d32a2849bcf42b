__version__ = "0.1.0"

# Noise that a reader can do nothing about, named word for word so that nothing else is hidden.
import logging, warnings
# bitsandbytes, at every import (peft imports it): it found no 4-bit kernels for CPUs, where nothing here computes in 4 bits
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
# transformers 5.17: an argument that TRL 1.16 reads by its old name
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
