"""Show which pixels the network of a finished run relies on, and test whether such maps are meaningful."""

from typing import Annotated

import typer
from typer import Argument, Option

from trainer.config.options import Wait
from trainer.runtime import console
from trainer.runtime.commands import JobCommand

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=JobCommand)
def main(
    run: Annotated[str, Argument(help="Folder or s3:// prefix of a finished run.")],
    images: Annotated[
        list[str],
        Option(
            help="Image file, local or s3://; repeat for more. Default: the images with the worst predictions on val."
        ),
    ] = [],  # noqa: B006
    count: Annotated[int, Option(min=1, help="Number of worst predictions to explain, without --images.")] = 8,
    method: Annotated[list[str], Option(help="Attribution method; repeat for more. Default: all.")] = [],  # noqa: B006
    tested_images: Annotated[int, Option(min=8, help="Number of val images to test the methods on.")] = 64,
    output: Annotated[str, Option(help="Folder or s3:// prefix for the results. Default: RUN/explanations.")] = "",
    wait: Wait = 0,
) -> None:
    """Write attribution maps, a test of each method on this network, and its first filters, as PNG files and a page."""
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
        with connect(wait_seconds=wait, one_process=True) as resources, console.show_events() as on_event:
            explanation = explain_run(
                run, chosen, method, resources, tested_images=tested_images, output=place, on_event=on_event
            )
        for test in explanation.tests:
            console.print_words(str(test))
        console.stdout.print(f"report  {save_explanation(explanation, place)}", markup=False)


if __name__ == "__main__":
    app()
