"""`qadapter playground`: a local page to try the dial."""

from qadapter.cli import command_parser
from qadapter.cli.options import add_policy_options, add_template_option
from qadapter.cli.serve import load_models, served_names
from qadapter.errors import ConfigError

HOST = "127.0.0.1"


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("playground", "Open a local page: base and policy side by side while the strength moves.")
    add_policy_options(parser)
    parser.add_argument("others", nargs="*", help="further adapter folders on the same base, each with a slider")
    parser.add_argument("--port", type=int, default=7860, help="port on this machine; 0 takes a free one")
    add_template_option(parser)
    options = parser.parse_args(arguments)

    from qadapter.cli.policies import loading_options, quiet_libraries, tokenizer_with
    from qadapter.devices import default_device
    from qadapter.modeling.mixing import checked_number

    try:
        import uvicorn

        from qadapter.playground.app import MAX_STRENGTH, create_app
        from qadapter.serving.server import listening_socket, url_of
        from qadapter.serving.settings import ServerSettings
    except ImportError as error:
        raise ConfigError(f"the playground needs {error.name}: pip install 'qadapter[serve]'.") from error
    if abs(checked_number(options.strength, "strength")) > MAX_STRENGTH:
        raise ConfigError(
            f"strength = {options.strength:g}: the page's dial goes from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}."
        )
    folders = [options.adapter, *options.others]
    names = served_names(folders)
    # Bound before minutes of loading.
    with listening_socket(HOST, ServerSettings(port=options.port).port) as listener:
        with quiet_libraries():
            model, tokenizer, models = load_models(
                dict(zip(names, folders, strict=True)),
                options.base_model,
                not options.no_verify,
                **loading_options(options),
            )
            tokenizer = tokenizer_with(tokenizer, options)
        labels = {adapter: name for name in names for adapter in models[name]} if options.others else {}
        app = create_app(model.to(default_device()), tokenizer, " + ".join(names), options.strength, labels)
        listener.listen()  # from here on a browser's first request waits instead of failing
        print(f"The page is at {url_of(listener)} (Ctrl-C stops)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0
