"""Main memory that grows in its place, and reading files into it or to the card."""

import ctypes
import mmap
import os


def _read(file, offset: int, size: int) -> bytes:
    return os.pread(file if isinstance(file, int) else file.fileno(), int(size), int(offset))


def read_file_to_device(file_obj, file_offset, size, stream, device_ptr, device, mark_cold=True):
    data = _read(file_obj, file_offset, size)
    ctypes.memmove(int(device_ptr), data, len(data))


def cleanup_file_reader():
    pass


class HostBuffer:
    def __init__(self, size, prewarm=0, max_grow_size=0, mark_cold=True):
        self.room = max(int(size), int(max_grow_size), mmap.PAGESIZE)
        self.memory = mmap.mmap(-1, self.room)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.size = int(size)

    def get_raw_address(self):
        return self.address

    def extend(self, size, reallocate=False, register=True):
        if self.size + int(size) > self.room:
            raise RuntimeError("HostBuffer.extend failed")
        self.size += int(size)
        return self.address

    def read_file_slice(self, file_obj, file_offset, size, offset=0, stream=0, device_ptr=0, device=-1):
        data = _read(file_obj, file_offset, size)
        for address in filter(None, (self.address + int(offset), int(device_ptr))):
            ctypes.memmove(address, data, len(data))
        self.size = max(self.size, int(offset) + len(data))

    def register(self, offset, size):
        pass

    def unregister(self, offset):
        pass

    def truncate(self, size, do_unregister=True):
        self.size = int(size)
