import time

from modules import devices


class State:
    skipped = False
    interrupted = False
    stopping_generation = False
    job = ""
    job_no = 0
    job_count = 0
    sampling_step = 0
    sampling_steps = 0
    textinfo = None
    time_start = None
    server_command = None

    def request_restart(self):
        self.interrupt()
        self.server_command = "restart"

    def skip(self):
        self.skipped = True

    def interrupt(self):
        self.interrupted = True

    def begin(self, job="(unknown)"):
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job, self.job_no, self.job_count = job, 0, -1
        self.sampling_step, self.textinfo, self.time_start = 0, None, time.time()
        devices.torch_gc()

    def end(self):
        # Fails, as the real one, where nothing was begun.
        time.time() - self.time_start
        self.job, self.job_count = "", 0
        devices.torch_gc()
