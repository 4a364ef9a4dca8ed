"""The training loop: steps, records, pictures, evaluations."""

import time

from regvq_fast.training.recorder import Recorder
from regvq_fast.training.vqgan import VQGANTask


def fit(task: VQGANTask, recorder: Recorder) -> None:
    """Run all steps of a task, recording as its configuration says, then evaluate and finish it."""
    run = task.config.run
    recorder.status("compiling, one to three minutes" if run.compile else "starting")
    window_start, window_images = time.perf_counter(), 0
    seconds, images = 0.0, 0  # of all windows but those that hold compilation
    compiling = {0, task.disc_start} if run.compile else {0}
    for step in range(task.steps):
        if step and step in compiling:
            recorder.status("compiling the discriminator")
        task.step(step)
        window_images += task.batch_size
        done = step + 1
        recorder.advance(done)
        if step in compiling or done % run.log_every == 0 or done == task.steps:
            values = task.record()  # waits for the device, so that the clock below is honest
            elapsed = time.perf_counter() - window_start
            values["images_per_second"] = window_images / elapsed
            recorder.record(done, values)
            if step not in compiling:
                seconds, images = seconds + elapsed, images + window_images
            window_start, window_images = time.perf_counter(), 0
        if done % run.image_every == 0 and done < task.steps:
            path = recorder.picture("reconstructions", done)
            task.save_reconstructions(path)
            recorder.show_picture(path, done)
            window_start, window_images = time.perf_counter(), 0
        if run.eval_every and done % run.eval_every == 0 and done < task.steps:
            recorder.record(done, task.evaluate().scalars(), prefix="val")
            window_start, window_images = time.perf_counter(), 0
    recorder.status("evaluating")
    metrics = task.evaluate()
    recorder.record(task.steps, metrics.scalars(), prefix="val")
    task.finish(recorder, metrics, images / seconds if seconds else float("nan"))
