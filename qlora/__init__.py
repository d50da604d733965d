import logging
import warnings

# Set here because it must be in force before bitsandbytes and peft are first imported. Two messages concern
# neither the user nor this code: an optional inference kernel of bitsandbytes on CPUs with AVX512-BF16, which
# training turns off (qlora/model/base.py), and a name that peft still uses in transformers.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
