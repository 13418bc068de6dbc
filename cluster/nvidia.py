"""The NVIDIA GPUs of one host, as NVML and CUDA_VISIBLE_DEVICES tell. Knows no other device and no CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pynvml

from ftlaunch.cluster.device import Device, device_by_index, visible_devices


def find_gpus(
    environ: Mapping[str, str], host_memory_bytes: int, notes: list[str]
) -> tuple[list[Device], str | None]:
    """The GPUs that CUDA would show to this process, and the version of the driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return [], None
    except pynvml.NVMLError as error:
        notes.append(_no_answer(error))
        return [], None

    devices: list[Device] = []
    by_name: dict[str, Device] = {}
    driver: str | None = None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        devices, by_name = _list_gpus(host_memory_bytes, notes)
    except pynvml.NVMLError as error:
        notes.append(_no_answer(error))
    finally:
        pynvml.nvmlShutdown()

    def look_up(entry: str) -> Device | None:
        return device_by_index(entry, devices) or _device_by_name(entry, by_name)

    kind = "NVIDIA GPU"
    return visible_devices(environ, "CUDA_VISIBLE_DEVICES", devices, look_up, kind, notes), driver


def wants_gpus(environ: Mapping[str, str]) -> bool:
    """False where the user has hidden every GPU."""
    return environ.get("CUDA_VISIBLE_DEVICES", "all").strip() not in ("", "-1", "NoDevFiles")


def _no_answer(error: Exception) -> str:
    return f"The NVIDIA driver does not answer ({error}): its GPUs cannot be used."


def _list_gpus(host_memory_bytes: int, notes: list[str]) -> tuple[list[Device], dict[str, Device]]:
    """The devices by index, and by UUID: those of whole GPUs and those of slices."""
    devices: list[Device] = []
    by_name: dict[str, Device] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            parts = _describe_parts(gpu, host_memory_bytes)
            if not parts:
                notes.append(f"GPU {index} is in MIG mode but holds no MIG device.")
                continue
            by_name.update({part.identifier: part for part in parts})
            # A GPU in MIG mode, when named as a whole, is its first slice to CUDA.
            by_name[pynvml.nvmlDeviceGetUUID(gpu)] = parts[0]
            devices.append(parts[0])
        except pynvml.NVMLError as error:
            notes.append(f"GPU {index} does not answer ({error}) and is left out.")
    return devices, by_name


def _describe_parts(gpu: Any, host_memory_bytes: int) -> list[Device]:
    """The GPU itself, or the slices of one in MIG mode, of which there may be none."""
    slices = _mig_handles(gpu)
    handles = [gpu] if slices is None else slices
    return [_describe(handle, gpu, host_memory_bytes) for handle in handles]


def _describe(handle: Any, gpu: Any, host_memory_bytes: int) -> Device:
    try:
        memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError_NotSupported:
        # Chips that share the memory of the host have none to report.
        memory_bytes = host_memory_bytes
    return Device(
        identifier=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        memory_bytes=memory_bytes,
        fast_bf16=pynvml.nvmlDeviceGetCudaComputeCapability(gpu) >= (8, 0),
    )


def _mig_handles(gpu: Any) -> list[Any] | None:
    """The slices of a GPU in MIG mode; None when it is not sliced."""
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(gpu)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None
    if current != pynvml.NVML_DEVICE_MIG_ENABLE:
        return None
    handles = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
        except pynvml.NVMLError_NotFound:
            continue
    return handles


def _device_by_name(entry: str, by_name: Mapping[str, Device]) -> Device | None:
    """Names may be cut short as long as they are unambiguous."""
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    matches = [device for name, device in by_name.items() if name.startswith(entry)]
    return matches[0] if len(matches) == 1 else None
