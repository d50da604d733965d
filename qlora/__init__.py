import logging

# The one thing done on import, as it must come before the first import of bitsandbytes: on CPUs with
# AVX512-BF16 it warns that an optional inference kernel is missing, which training turns off
# (qlora/model/base.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
