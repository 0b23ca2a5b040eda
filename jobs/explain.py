"""Shows which pixels a finished run's network decides by, and whether such maps mean anything for it."""

from typing import Annotated

import typer
from typer import Argument, Option

from trainer.config.options import Wait
from trainer.runtime import console

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[str, Argument(help="Run folder, local or s3://.")],
    images: Annotated[list[str], Option(help="Image files; default: the worst predictions on the val split.")] = [],  # noqa: B006
    count: Annotated[int, Option(min=1, help="How many of the worst predictions.")] = 8,
    method: Annotated[list[str], Option(help="Attribution methods; default: all.")] = [],  # noqa: B006
    tested_images: Annotated[int, Option(min=8, help="Val images that the methods are tested on.")] = 64,
    output: Annotated[str, Option(help="Folder or s3:// prefix; default: RUN/explanations.")] = "",
    wait: Wait = 0,
) -> None:
    """Write attribution maps, a test of each method on this network, and its first filters: PNG files and one page."""
    with console.exit_codes():
        from data_prep.decode import ImageOptions
        from data_prep.images import decode_file
        from trainer.explain.page import ExplainedImage, check_output, choose_worst, explain_run, save_explanation
        from trainer.inference import read_finished_run
        from trainer.runtime.cluster import connect

        manifest = read_finished_run(run)[0].read_manifest()
        place = check_output(run, output)
        options = ImageOptions.of(manifest)
        chosen = [ExplainedImage(name, decode_file(name, options)) for name in images] or choose_worst(run, count)
        with connect(wait_seconds=wait, one_process=True) as resources:
            explanation = explain_run(run, chosen, method, resources, tested_images=tested_images)
        for test in explanation.tests:
            console.stdout.print(str(test), markup=False)
        console.stdout.print(f"report  {save_explanation(explanation, place)}", markup=False)


if __name__ == "__main__":
    app()
