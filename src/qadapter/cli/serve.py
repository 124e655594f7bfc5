"""`qadapter serve`: an OpenAI-compatible server for adapters on one base, with a strength dial a request."""

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.cli import command_parser
from qadapter.cli.options import add_interpolation_option, add_loading_options
from qadapter.errors import ConfigError
from qadapter.serving.settings import ServerSettings

if TYPE_CHECKING:
    from qadapter.modeling import QAdapterForCausalLM

API_KEY_VARIABLE = "QADAPTER_API_KEY"
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

logger = logging.getLogger("qadapter.serving")


def run(arguments: list[str]) -> int:
    """Run the command until it is told to stop; its exit code."""
    options = _parser(ServerSettings()).parse_args(arguments)
    settings = ServerSettings(
        **{name: getattr(options, name) for name in vars(ServerSettings())} | {"api_key": _api_key(options.api_key)}
    )
    service_type, server_module = _serving()

    from qadapter.cli.policies import loading_options, quiet_libraries
    from qadapter.devices import default_device

    names = served_names(options.adapters)
    listener = server_module.listening_socket(settings.host, settings.port)  # before minutes of loading
    with listener:
        with quiet_libraries():
            model, tokenizer, models = load_models(
                dict(zip(names, options.adapters, strict=True)),
                options.base_model,
                not options.no_verify,
                **loading_options(options),
            )
        model.interpolation = model.checked_interpolation(options.interpolation)
        service = service_type(model.to(default_device()), tokenizer, models, settings)
        logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
        logger.setLevel(logging.INFO)
        if settings.api_key is None and not settings.on_loopback:
            logger.warning("everybody who can reach %s can use this server: set an API key.", settings.host)
        url = server_module.url_of(listener)

        def announce() -> None:
            print(f"Serving {', '.join(service.catalogue.names)} at {url}/v1 (Ctrl-C stops)", flush=True)

        # uvicorn raises the signal again once it has stopped; by then there is nothing left to end.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server_module.GracefulServer(service, announce).run(sockets=[listener])
    return 0


def _serving() -> tuple[Any, Any]:
    try:
        from qadapter.serving import server
        from qadapter.serving.app import Service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qadapter"):
            raise
        raise ConfigError(
            f"the server needs packages that are not installed ({error.name} is missing): pip install 'qadapter[serve]'"
        ) from error
    return Service, server


def _parser(defaults: ServerSettings) -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        "Serve adapters with OpenAI's protocol. Model names are the folders' names, and `base`. "
        'Requests set the dial with extra_body={"qadapter": {"strength": 0.7}}.',
    )
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="adapter folders or hub ids, all of one base")
    add_loading_options(parser)
    add_interpolation_option(parser)
    parser.add_argument("--host", default=defaults.host, help="address to listen on; 0.0.0.0 opens it to others")
    parser.add_argument("--port", type=int, default=defaults.port, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key", default=None, help=f"key that clients must send; better in ${API_KEY_VARIABLE}")
    limits = {
        "max-context": (int, "tokens of prompt and answer together (default: the base's own limit)"),
        "max-batch": (int, "answers decoded at once"),
        "max-queue": (int, "prompts that may wait; more get 429"),
        "max-n": (int, "choices of one prompt"),
        "max-body-bytes": (int, "size of a request"),
        "prefill-tokens": (int, "prompt tokens processed between two decoding steps"),
        "request-timeout": (float, "seconds until an answer must be complete"),
        "shutdown-timeout": (float, "seconds that answers under way get when the server stops"),
    }
    for name, (kind, text) in limits.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name.replace("-", "_")), help=text)
    return parser


def _api_key(option: str | None) -> str | None:
    return os.environ.get(API_KEY_VARIABLE) if option is None else option


def served_names(folders: Sequence[str]) -> list[str]:
    """The name of each adapter: the last part of its folder or hub id.

    Raises:
        ConfigError: two are the same, or one is the base's.
    """
    from qadapter.serving.catalogue import require_free_names

    # Those of "." and ".." are the names of what they lead to.
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name if path.name in ("", "..") else path.name for path in paths]
    require_free_names(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several adapters are called {twice}: rename their folders, requests name them so.")
    return names


def load_models(
    folders: dict[str, str], base_model: str | None, verify: bool, **model_kwargs: Any
) -> "tuple[QAdapterForCausalLM, Any, dict[str, dict[str, float]]]":
    """(one policy with the adapters of all folders, its tokenizer, {served name: {adapter: weight}}).

    A name stands for its folder's adapters with their stored weights; a single folder may hold several.
    """
    from qadapter.modeling import QAdapterForCausalLM
    from qadapter.modeling.hub import local_folder
    from qadapter.modeling.loading import load_base_of, tokenizer_of
    from qadapter.modeling.manifest import read_manifest

    first_name, first = next(iter(folders.items()))
    if len(folders) == 1:
        model = QAdapterForCausalLM.from_pretrained(first, base_model=base_model, verify=verify, **model_kwargs)
        return model, tokenizer_of(first, model.base_source), {first_name: dict(model.adapter_weights)}
    # Names of adapters are narrower than names of folders.
    adapters = {f"adapter{number}": folder for number, folder in enumerate(folders.values())}
    base, source = load_base_of(read_manifest(local_folder(first)), base_model, model_kwargs)
    model = QAdapterForCausalLM.from_pretrained(base, adapters=adapters, verify=verify)
    models = {name: {adapter: model.adapter_weights[adapter]} for name, adapter in zip(folders, adapters, strict=True)}
    return model, tokenizer_of(first, source), models
