import logging
import warnings

# Two messages at import and load that concern neither the user nor this code: an optional inference kernel of
# bitsandbytes on CPUs with AVX512-BF16, and a name that peft still uses in transformers.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
