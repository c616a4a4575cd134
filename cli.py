"""The command line `trtq`: registers the commands of `trtq.commands`."""

from __future__ import annotations

from trtq.commands.app import App, OrderedGroup, group, main, with_former_names
from trtq.commands.artefact import inspect
from trtq.commands.bench import BenchGroup, bench, bench_kernels
from trtq.commands.build import build
from trtq.commands.export import export
from trtq.commands.images import evaluate, generate
from trtq.commands.machine import demo, doctor
from trtq.commands.package import package_triton
from trtq.commands.plugins import build_plugins
from trtq.commands.quantize import quantize
from trtq.commands.selftest import selftest
from trtq.commands.serve import serve
from trtq.commands.verify import verify

BATCH_RANGE = with_former_names({"--batch": "--batch-range"})
BATCH_SIZES = with_former_names({"--batch": "--batch-sizes", "--against": "--baseline"})

app = App(
    cls=OrderedGroup,
    name="trtq",
    help=main.__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(main)
app.command()(doctor)
app.command()(quantize)
app.command(cls=BATCH_RANGE)(export)
app.command(cls=BATCH_RANGE)(build)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(verify)
app.command()(serve)
app.command()(demo)
app.command()(selftest)

bench_app = group(BenchGroup, add_help_option=False)
bench_app.command(BenchGroup.default, hidden=True, cls=BATCH_SIZES)(bench)
bench_app.command("kernels")(bench_kernels)
app.add_typer(bench_app, name="bench", help="Compare the speed and memory of artefacts.")

package_app = group(no_args_is_help=True)
package_app.command("triton")(package_triton)
app.add_typer(package_app, name="package", help="Package an artefact for another server.")

plugins_app = group(no_args_is_help=True)
plugins_app.command("build")(build_plugins)
app.add_typer(plugins_app, name="plugins", help="Compile the CUDA kernels.")


if __name__ == "__main__":
    app()
