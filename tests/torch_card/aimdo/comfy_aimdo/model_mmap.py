"""A model file in memory."""

import ctypes
import mmap
import os


class ModelMMAP:
    def __init__(self, path):
        self.handle = os.open(path, os.O_RDONLY)
        self.memory = mmap.mmap(self.handle, 0, access=mmap.ACCESS_COPY)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def get(self):
        return self.address

    def get_file_handle(self):
        return self.handle

    def bounce(self):
        return True

    def __del__(self):
        os.close(self.handle)
