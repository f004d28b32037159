"""The library as a whole: always there."""


class _Library:
    def __getattr__(self, name):
        return lambda *_, **__: 0


lib = _Library()
devctxs: list[int] = []


def init(*_, **__) -> bool:
    return True


def init_devices(devices) -> bool:
    devctxs[:] = [1 for _ in devices]
    return bool(devctxs)


def get_devctx(device: int) -> int:
    return 1


def deinit() -> None:
    pass


def analyze() -> None:
    pass


def get_total_vram_usage() -> int:
    return 0


def __getattr__(name: str):
    if name.startswith("set_log_"):
        return lambda: None
    raise AttributeError(name)
