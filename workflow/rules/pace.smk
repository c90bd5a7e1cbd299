# What Snakemake would do again and again, for graphs of hundreds and thousands of jobs. Of its internals: another
# version may do it in another way, and then nothing here is done.
import gc
import threading
from functools import lru_cache

import snakemake.common
import snakemake.jobs
import snakemake.rules
from snakemake.scheduling.job_scheduler import JobScheduler

# The graph of thousands of jobs is not garbage, and neither is what has been imported for it; looking through them for
# some, again and again as the graph grows, would take a fifth of a dry run.
gc.set_threshold(100_000)
gc.freeze()

# Snakemake asks for the signature of a function whenever it calls one, twenty times for each job, most of them for the
# expressions of a profile's resources. They are the same few functions, so each is looked at once.
if hasattr(snakemake.common, "get_function_params"):
    parameters_of = lru_cache(maxsize=1000)(snakemake.common.get_function_params)
    for part in (snakemake.common, snakemake.jobs, snakemake.rules):
        part.get_function_params = parameters_of


# Whenever it looks for jobs to start, because one has ended or because it had planned to, Snakemake plans to look again
# a second later. So each job that ends adds one look a second for the rest of the study, and each looks at the inputs
# of all jobs that are ready: after an hour of 800 jobs that was two fifths of a core. One planned look is enough.
def look_again(scheduler, delay):
    if vars(scheduler).get("planned_look"):
        return

    def look():
        scheduler.planned_look = None  # first, or the look would plan no other
        scheduler._open_jobs.release()

    scheduler.planned_look = threading.Timer(delay, look)
    scheduler.planned_look.start()


if hasattr(JobScheduler, "_schedule_reevalutation"):
    JobScheduler._schedule_reevalutation = look_again
