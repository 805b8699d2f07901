from functools import wraps

from modules import fifo_lock, shared

queue_lock = fifo_lock.FIFOLock()


def wrap_queued_call(func):
    def queued(*args, **kwargs):
        with queue_lock:
            return func(*args, **kwargs)

    return queued


def wrap_gradio_gpu_call(func, extra_outputs=None):
    """As a click on Generate: what it interrupted is forgotten, also after the lock is free again."""

    @wraps(func)
    def call(*args, **kwargs):
        try:
            with queue_lock:
                shared.state.begin(job=None)
                result = func(*args, **kwargs)
                shared.state.end()
        finally:
            shared.state.interrupted = False
            shared.state.job_count = 0
            shared.state.job = ""
        return result

    return call
