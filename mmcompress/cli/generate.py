"""`mmc generate`: see a model answer, from a checkpoint or from exported files."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli import options


@click.command(
    "generate",
    epilog="\b\nExamples:\n  mmc generate WHISPER --audio speech.wav\n  mmc generate WHISPER-onnx --audio a.wav --json\n"
    '  mmc generate VLM-onnx --image photo.jpg --prompt "What is on the table?" --runner openvino\n'
    '  mmc generate VLM --image a.jpg --image b.jpg --together --prompt "What is different?"\n'
    '  mmc generate VLM --frames clip/ --fps 4 --prompt "What happens?"',
)
@options.model_argument
@click.option("--audio", multiple=True, type=click.Path(path_type=Path), help="A recording; repeatable.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeatable.")
@click.option("--together", is_flag=True, help="Ask once about all pictures, not once about each.")
@click.option(
    "--frames",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder of numbered images, the frames of a video; repeatable.",
)
@click.option("--fps", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True, help="Of --frames.")
@click.option("--prompt", default="", help="What is asked, about each picture or by itself.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Of an answer.  [default: as the model's own settings say]"
)
@click.option(
    "--runner", help="onnxruntime or openvino for exported files.  [default: onnxruntime; torch for a checkpoint]"
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Samples at a time.")
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads.  [default: OMP_NUM_THREADS, else every usable core]"
)
@options.device_option
@options.talk_options
def command(
    model: str,
    audio: tuple[Path, ...],
    images: tuple[Path, ...],
    together: bool,
    frames: tuple[Path, ...],
    fps: float,
    prompt: str,
    max_new_tokens: int | None,
    runner: str | None,
    batch_size: int,
    threads: int | None,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Answer in text what is heard, seen or asked: one line for each file or folder of frames, recordings first.

    Greedy and the same every time. MODEL is a checkpoint (run by torch) or a directory of mmc export, whose answers are those of
    the checkpoint. Recordings longer than the model hears at once are cut where it is quiet. How long each stage took is said on
    stderr, and in the document of --json.
    """
    from mmcompress.cli import render
    from mmcompress.jobs.generate import generate, samples_of

    terminal = render.Terminal(quiet, verbose)
    made = generate(
        model,
        samples_of(audio, images, prompt, frames=frames, rate=fps, together=together),
        runner=runner,
        limit=max_new_tokens,
        batch=batch_size,
        threads=threads,
        device=device,
    )
    if as_json:
        render.document(made.to_json())
        return
    for text in made.answers:
        click.echo(text)
    found = made.timing()
    if found:
        speed = found["tokens_per_second"]
        terminal.say(
            f"{made.runner}: first token after {found['prepare_ms']:.1f} ms of preparing and {found['first_token_ms']:.1f} ms"
            + (f", then {found['token_ms']:.2f} ms for each ({speed:,.0f} tokens/s)" if speed else "")
        )
