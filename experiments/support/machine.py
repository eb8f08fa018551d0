"""What a script asks of the machine that it runs on, before its first array."""

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import warnings
import zlib
from pathlib import Path

import jax
from jaxtyping import Array, Key

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def prepare_machine() -> None:
    """Cache compiled programs on disk, keep freed memory, and make random numbers depend on seeds alone."""
    keep_compiled_programs()
    if only_cpus():
        keep_freed_memory()
    jax.config.update("jax_threefry_partitionable", True)  # whatever JAX's environment variables say
    jax.config.update("jax_random_seed_offset", 0)


def only_cpus() -> bool:
    """Whether JAX will run on a CPU, found without initializing it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and not importlib.util.find_spec("libtpu")


def why_no_device() -> str | None:
    """The reason why JAX finds no device, or None."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as problem:  # the latter, without a word, where a platform's plugin is not installed
        reason = (str(problem) or "no support for that platform is installed").splitlines()[0]
        return f"JAX finds no device with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}"


def random_key(seed: int) -> Key[Array, ""]:
    """The key of `seed`. Under other implementations (JAX_DEFAULT_PRNG_IMPL) what an example draws depends on its batch."""
    return jax.random.key(seed, impl="threefry2x32")


def keep_compiled_programs() -> None:
    """Cache compiled programs in ~/.cache/diffusion_jax, by kind of processor, unless JAX_COMPILATION_CACHE_DIR is set.

    JAX 0.10 logs a long false error for each cached program, about a processor with other features (prefer-no-gather,
    prefer-no-scatter). So this hides XLA's log unless JAX_LOGGING_LEVEL is set. JAX's warnings and exceptions still appear.
    """
    if "JAX_LOGGING_LEVEL" not in os.environ:
        jax.config.update("jax_logging_level", "CRITICAL")
        logging.getLogger("jax").setLevel(logging.WARNING)  # such as that there is a GPU and a JAX without it
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"~/.cache/diffusion_jax/{processor()}"))


def processor() -> str:
    """A name for the processor's kind: a program compiled for one may crash on another."""
    return f"{platform.machine()}-{zlib.crc32(processor_flags().encode()):08x}"


def processor_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def warn_of_emulated(precision: str) -> None:
    """Warn if bfloat16 is emulated on this device, and slower than float32."""
    device = jax.devices()[0]
    old_gpu = re.fullmatch(r"[1-7]\.\d", str(getattr(device, "compute_capability", "")))  # Nvidia's before Ampere
    plain_cpu = device.platform == "cpu" and not {"avx512_bf16", "amx_bf16", "bf16"} & set(processor_flags().split())
    if precision == "bfloat16" and (old_gpu or plain_cpu):
        warnings.warn(f"{device.device_kind} has no bfloat16 arithmetic: --precision float32 is faster here", stacklevel=2)


def keep_freed_memory() -> None:
    """Keep glibc from returning a step's buffers to the system and taking them again (docs/performance_log.md).

    Not for GPUs: XLA compiles for them in many threads, which was about twice as slow with these settings.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            ctypes.CDLL(None).mallopt(option, value)
