"""What a script asks of the machine that it runs on, before its first array."""

import ctypes
import os
import platform
import zlib
from pathlib import Path

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def prepare_machine() -> None:
    """Compiled programs are kept on disk for the next start; memory that a step frees is kept for the next step."""
    keep_compiled_programs()
    keep_freed_memory()


def keep_compiled_programs() -> None:
    """In ~/.cache/diffusion_jax, apart for each kind of processor; JAX_COMPILATION_CACHE_DIR names another folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"~/.cache/diffusion_jax/{processor()}"))


def processor() -> str:
    """A name for the processor's kind: a program compiled for one may crash on another."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def keep_freed_memory() -> None:
    """Under glibc, which else gives a step's buffers back and takes them zeroed again: a seventh of a step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            ctypes.CDLL(None).mallopt(option, value)
