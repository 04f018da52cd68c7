"""The server options and the one-shot commands: what ``server.py`` itself does."""

from __future__ import annotations

from dataclasses import dataclass

from modules.options.spec import option, specs

GROUPS = {"server": "Server", "command": "Without a page: do one thing and exit"}


@dataclass(frozen=True)
class ServerOptions:
    """How the page is served, and where things lie."""

    listen: bool = option(
        "flag", False, "Listen", "Serve the page to the network too. Makes a password where no credentials are given.",
        group="server",
    )  # fmt: skip
    listen_host: str = option(
        "text", "", "Address", "The address to listen on.", group="server",
        default_help="127.0.0.1; with --listen every address of this machine",
    )  # fmt: skip
    listen_port: int = option(
        "integer", 7860, "Port", "The port of page and API.", group="server", low=0, high=65535,
        default_help="7860; 0 takes a free one",
    )  # fmt: skip
    share: bool = option(
        "flag", False, "Share", "Make a public address through Gradio's tunnel, for a week at most.", group="server",
    )  # fmt: skip
    allowed_host: tuple[str, ...] = option(
        "names", (), "Allowed hosts", "Further names that the server goes by, behind a proxy for one.", group="server",
        default_help="localhost; with --listen this machine's names and addresses",
    )  # fmt: skip
    gradio_auth: tuple[str, ...] = option(
        "names", (), "Administrators", "Who may log in and do everything, as user:password.", group="server",
        secret=True, whole=True,
    )  # fmt: skip
    gradio_auth_path: str = option(
        "text", "", "Administrators' file", "A file with one user:password a line.", group="server",
    )  # fmt: skip
    guest_auth: tuple[str, ...] = option(
        "names", (), "Guests", "Who may log in and chat, and load nothing, as user:password.", group="server",
        secret=True, whole=True,
    )  # fmt: skip
    api_key: str = option(
        "text", "", "API key", "A key for programs that generate text: Authorization: Bearer KEY.", group="server",
        secret=True,
    )  # fmt: skip
    admin_key: str = option(
        "text", "", "Administrator's key", "A key for programs that load models too.", group="server", secret=True,
    )  # fmt: skip
    ssl_keyfile: str = option("text", "", "TLS key", "The file of the key for HTTPS.", group="server")
    ssl_certfile: str = option("text", "", "TLS certificate", "The file of the certificate for HTTPS.", group="server")
    subpath: str = option(
        "text", "", "Subpath", "The path under which a proxy in front serves the page: /llm.", group="server",
    )  # fmt: skip
    auto_launch: bool = option(
        "flag", False, "Open a browser", "Open the page in the browser when it is up.", group="server",
    )  # fmt: skip
    home: str = option(
        "text", "", "Home", "The folder that holds models/, loras/ and settings.yaml.", group="server",
        default_help="where server.py lies",
    )  # fmt: skip
    model_dir: tuple[str, ...] = option(
        "names", (), "Model folders", "Further folders with models, beside models/.", group="server", whole=True,
    )  # fmt: skip
    lora_dir: tuple[str, ...] = option(
        "names", (), "LoRA folders", "Further folders with LoRAs, beside loras/.", group="server", whole=True,
    )  # fmt: skip
    hf_cache: bool = option(
        "flag", True, "Hugging Face cache", "Offer the models and LoRAs that the Hugging Face cache holds too.",
        group="server",
    )  # fmt: skip
    settings: str = option(
        "text", "", "Settings file", "The file with the defaults of this machine.", group="server",
        default_help="settings.yaml",
    )  # fmt: skip
    warm_worker: bool = option(
        "flag", True, "Warm worker",
        "Keep a process waiting that has imported the libraries, so that loading starts at once.", group="server",
    )  # fmt: skip
    quantized_cache: bool = option(
        "flag", True, "Quantized copies",
        "Keep what 4-bit and 8-bit loads make of a model, so that the next such load need not quantize again.",
        group="server",
    )  # fmt: skip
    load_on_demand: bool = option(
        "flag", False, "Load on demand",
        "Load the model that a request of the API names, with its saved settings; the request waits meanwhile.",
        group="server",
    )  # fmt: skip
    max_loaded: int = option(
        "integer", 1, "Models at a time",
        "How many models may be loaded at a time, where memory allows; the one used least recently makes room.",
        group="server", low=1, high=64,
    )  # fmt: skip
    idle_timeout: float = option(
        "number", 0.0, "Idle timeout", "Unload a model that nobody has used for so long. Pinned ones stay.",
        group="server", low=0, unit="minutes", default_help="0: never",
    )  # fmt: skip
    load_wait: int = option(
        "integer", 300, "Wait for a load", "With --load-on-demand: the seconds that a request waits for its model.",
        group="server", low=1, high=86_400,
    )  # fmt: skip
    verbose: bool = option("flag", False, "Verbose", "Log more, and print the details of errors.", group="server")


@dataclass(frozen=True)
class CommandOptions:
    """What to do instead of serving the page. All off: serve."""

    prompt: str = option(
        "text", "", "Prompt", "Load --model, print its answer to this text, exit.", group="command", alone=True,
    )  # fmt: skip
    raw_prompt: bool = option(
        "flag", False, "Raw prompt", "Continue the text as it stands, without the model's chat template.",
        group="command", needs="prompt",
    )  # fmt: skip
    plan: bool = option(
        "flag", False, "Plan", "Print the memory plan for --model, exit.", group="command", alone=True,
    )  # fmt: skip
    json: bool = option("flag", False, "JSON", "With --plan: print it as JSON.", group="command", needs="plan")
    load_anyway: bool = option(
        "flag", False, "Load anyway", "Load --model even where the plan says that it does not fit.", group="command",
    )  # fmt: skip
    merge: str = option(
        "text", "", "Merge", "Write --model with --lora merged in as a new model of this name under models/, exit.",
        group="command", alone=True,
    )  # fmt: skip
    train: str = option(
        "text", "", "Train", "Train a LoRA as this YAML file says, and exit. Again: go on where it ended.",
        group="command", alone=True,
    )  # fmt: skip
    max_shard_size: str = option(
        "text", "5GB", "Largest file", "With --merge: write the weights in files of at most this size.",
        group="command", needs="merge",
    )  # fmt: skip
    demo: bool = option(
        "flag", False, "Demo", "Bring the demo model, SmolLM2-135M-Instruct, into models/ and select it.",
        group="command",
    )  # fmt: skip
    download: str = option(
        "text", "", "Download", "Bring a model or LoRA from the Hub, USER/MODEL[:BRANCH] or its address, and exit.",
        group="command", alone=True,
    )  # fmt: skip
    file: str = option(
        "text", "", "File", "With --download: only the files of this name, or that match this glob.",
        group="command", needs="download",
    )  # fmt: skip
    check: bool = option(
        "flag", False, "Check", "Tell what of this machine and its packages works, exit.", group="command", alone=True,
    )  # fmt: skip


SERVER_OPTIONS = specs(ServerOptions)
COMMAND_OPTIONS = specs(CommandOptions)
