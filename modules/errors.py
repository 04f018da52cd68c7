"""The error tree: everything Loadstone raises on purpose is one of these.

Two branches: :class:`UserError` is what the user can mend (exit status 2), :class:`InternalError` the rest (exit
status 1). The title and remedy of a class say what it means; README's table of errors is made of them.

``kind`` is stable and for programs; ``message`` says what happened, with names and numbers; ``hint``
says what to change; ``fix`` holds option values that would mend it, for a button. Only the edge (page,
API, command line) formats them for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class LoadstoneError(Exception):
    """Base of the tree. ``status`` is the HTTP status and ``exit_status`` the command line's."""

    kind: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1
    retry_after_s: int = 0  # what a program is told to wait before it tries again; 0: nothing is told
    title: ClassVar[str] = "Something went wrong"
    remedy: ClassVar[str] = ""  # the general advice, for README's troubleshooting and as default hint

    def __init__(
        self, message: str, hint: str = "", *, fix: Mapping[str, Any] | None = None, details: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.remedy
        self.fix = dict(fix or {})
        self.details = details  # a traceback or a log's tail, folded away until asked for

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON-ready data; :func:`error_from_dict` makes it again."""
        told = {"kind": self.kind, "message": self.message, "hint": self.hint}
        return {**told, "fix": self.fix, "details": self.details}


class UserError(LoadstoneError):
    kind = "user"
    status = 400
    exit_status = 2
    title = "This cannot be done as asked"


class OptionError(UserError):
    kind = "option"
    status = 422
    title = "An option's value cannot be used"
    remedy = "Change the option named in the message; its help text gives the values it takes."


class OptionConflict(OptionError):
    kind = "option_conflict"
    status = 409
    title = "Options contradict each other"
    remedy = "Turn one of the two options off."


class SettingsError(UserError):
    kind = "settings"
    title = "A settings file cannot be used"
    remedy = "Mend the line named in the message, or delete the file to start from the defaults."


class ModelNotFound(UserError):
    kind = "model_not_found"
    status = 404
    title = "No such model"
    remedy = "Put the model's folder under models/, or name its folder with --model-dir."


class BrokenCheckpoint(UserError):
    kind = "broken_checkpoint"
    status = 422
    title = "The model's files are damaged or incomplete"
    remedy = "Download the file named in the message again."


class UnsafeCheckpoint(BrokenCheckpoint):
    kind = "unsafe_checkpoint"
    title = "The model's files are not safe to open"
    remedy = "Get the model as safetensors, from a source you trust."


class BrokenTemplate(BrokenCheckpoint):
    kind = "broken_template"
    title = "The model's chat template does not work"
    remedy = "Choose another model, or mend chat_template.jinja in this one's folder and load it again."


class NotAModel(BrokenCheckpoint):
    kind = "not_a_model"
    title = "This is not a model"
    remedy = "A model folder holds a config.json and weights; a single .gguf file is one too."


class UnsupportedModel(UserError):
    kind = "unsupported_model"
    status = 422
    title = "No loader takes this model"
    remedy = "A newer transformers, or a checkpoint in another format, may be needed."


class AdapterError(UserError):
    kind = "adapter"
    status = 422
    title = "The LoRA cannot be used"
    remedy = "Nothing was changed. Download the LoRA again as safetensors, or choose another."


class AdapterNotFound(AdapterError):
    kind = "adapter_not_found"
    status = 404
    title = "No such LoRA"
    remedy = "Nothing was changed. Put the LoRA's folder under loras/, or name its folder with --lora-dir."


class AdapterMismatch(AdapterError):
    kind = "adapter_mismatch"
    status = 409
    title = "The LoRA does not fit the model"
    remedy = "Nothing was changed. Load the base model that the LoRA was trained on, or choose another LoRA."


class CustomCodeRefused(UserError):
    kind = "custom_code"
    status = 403
    title = "The model brings its own Python code"
    remedy = "Read the files named in the message; if you trust them, allow them or use --trust-remote-code."


class MissingPackage(UserError):
    kind = "missing_package"
    status = 424
    title = "A package is missing"
    remedy = "Install the package named in the message and load again; no restart is needed."


class OutOfMemory(UserError):
    kind = "out_of_memory"
    status = 507
    title = "Not enough memory"
    remedy = "Load in 4-bit, choose a shorter context, or let layers go to RAM or disk."


class NoPlace(OutOfMemory):
    kind = "no_place"
    title = "There is no place for another model"
    remedy = "Unpin or unload one, or start the server with a larger --max-loaded."


class DiskFull(UserError):
    kind = "disk_full"
    status = 507
    title = "Not enough disk space"
    remedy = "Free some space, or name another folder."


class NothingLoaded(UserError):
    kind = "nothing_loaded"
    status = 409
    title = "No model is loaded"
    remedy = "Load a model on the Model tab first; guests wait until that is done."


class Busy(UserError):
    kind = "busy"
    status = 409
    title = "Something else is under way"
    remedy = "Wait for it to finish, or cancel it."


class RequestTooLong(UserError):
    kind = "request_too_long"
    status = 413
    title = "The prompt does not fit the context"
    remedy = "Shorten the prompt, or load the model with a larger context."


class NotOnHub(UserError):
    kind = "not_on_hub"
    status = 404
    title = "The Hub has no such model"
    remedy = "Check the name. A private model is shown only to a token whose owner may see it."


class HubTokenRefused(UserError):
    kind = "hub_token"
    status = 401
    title = "The Hub does not accept the token"
    remedy = "Give a token that is valid: on the page, in HF_TOKEN, or with hf auth login."


class HubForbidden(UserError):
    kind = "hub_forbidden"
    status = 403
    title = "The token may not read this"
    remedy = "Use a token that has read access to the repository."


class LicenceNotAccepted(HubForbidden):
    kind = "hub_licence"
    title = "The model's licence has to be accepted first"
    remedy = "Open the model's page on the Hub while logged in, accept, and try again."


class ModelInUse(UserError):
    kind = "model_in_use"
    status = 409
    title = "The model is in use"
    remedy = "Unload it, or cancel its download, and try again."


class PortInUse(UserError):
    kind = "port_in_use"
    title = "The port is taken"
    remedy = "Stop the other program, or choose another port with --listen-port."


class AccessRefused(UserError):
    kind = "access_refused"
    status = 403
    title = "This request is not allowed"
    remedy = "Open the page under the address that the server printed when it started."


class LoginRequired(AccessRefused):
    kind = "login_required"
    status = 401
    title = "Who are you?"
    remedy = "Log in on the page, or send a key as Authorization: Bearer KEY."


class TooManyAttempts(AccessRefused):
    kind = "too_many_attempts"
    status = 429
    retry_after_s = 30  # the longest wait
    title = "Too many wrong attempts"
    remedy = "Wait, then try again."


class UnsupportedParameter(UserError):
    kind = "unsupported_parameter"
    title = "This is not supported"
    remedy = "Leave out the parameter named in the message."


class RequestTooLarge(UserError):
    kind = "request_too_large"
    status = 413
    title = "The request is too large"
    remedy = "Send less at a time."


class RequestTooSlow(UserError):
    kind = "request_too_slow"
    status = 408
    title = "The request took too long to come"
    remedy = "Send it again over a better connection."


class Overloaded(UserError):
    kind = "overloaded"
    status = 503
    retry_after_s = 5
    title = "Too many are waiting"
    remedy = "Try again in a while."


class LoadPending(UserError):
    kind = "load_pending"
    status = 503
    retry_after_s = 10
    title = "The model is not there yet"
    remedy = "Try again in a while: the load goes on. --load-wait sets how long a request waits."


class BrokenData(UserError):
    kind = "broken_data"
    status = 422
    title = "The training data cannot be used"
    remedy = "Mend the line named in the message. One JSON object a line, or a JSON list; or plain text."


class NameTaken(UserError):
    kind = "name_taken"
    status = 409
    title = "The name is taken"
    remedy = "Choose another name; nothing is overwritten."


class NotTrainable(UserError):
    kind = "not_trainable"
    status = 409
    title = "The model cannot be trained as it is loaded"
    remedy = "Load it in another way, or load another model."


class MustUnload(UserError):
    kind = "must_unload"
    status = 409
    title = "The loaded model has to make room"
    remedy = "Say that it may be unloaded for the time; it comes back afterwards."


class TrainingDiverged(UserError):
    kind = "training_diverged"
    status = 422
    title = "The training fell apart"
    remedy = "Lower the learning rate, or warm up longer. The last checkpoint was kept."


class InternalError(LoadstoneError):
    kind = "internal"
    title = "Something failed that should not"
    remedy = "The log under the message tells more; please report it."


class Cancelled(InternalError):
    kind = "cancelled"
    status = 499
    title = "Cancelled"
    remedy = "Load again when you are ready."


class WorkerCrashed(InternalError):
    kind = "worker_crashed"
    status = 502
    title = "The model's process ended by itself"
    remedy = "Load the model again; the log under the message holds the process's last words."


class WorkerKilled(WorkerCrashed):
    kind = "worker_killed"
    title = "The model's process was killed"
    remedy = "Load in 4-bit, choose a shorter context, or close other programs; then load it again."


class WorkerTimeout(InternalError):
    kind = "worker_timeout"
    status = 504
    title = "The model's process does not answer"
    remedy = "Unload the model and load it again."


class HubUnreachable(InternalError):
    kind = "hub_unreachable"
    status = 502
    title = "The Hub cannot be reached"
    remedy = "Check the network, HF_ENDPOINT and the proxy; what has come is kept, so that it can go on."


class BrokenDownload(InternalError):
    kind = "broken_download"
    status = 502
    title = "What came is not what the Hub promises"
    remedy = "Try again later; a proxy or a mirror may be damaging files. Nothing of it is offered as a model."


class WrongResult(InternalError):
    kind = "wrong_result"
    title = "What was loaded is not what was asked for"
    remedy = "Nothing was kept. Change the options named in the message."


class LoadFailed(InternalError):
    kind = "load_failed"
    title = "Loading failed"
    remedy = "The traceback under the message tells what the library said."


def error_classes() -> Iterator[type[LoadstoneError]]:
    """Every class of the tree, parents before children."""
    queue: list[type[LoadstoneError]] = [LoadstoneError]
    while queue:
        current = queue.pop(0)
        yield current
        queue.extend(current.__subclasses__())


def error_from_dict(data: Mapping[str, Any]) -> LoadstoneError:
    """The error that :meth:`LoadstoneError.to_dict` described; an unknown kind gives InternalError."""
    by_kind = {cls.kind: cls for cls in error_classes()}
    cls = by_kind.get(str(data.get("kind")), InternalError)
    return cls(
        str(data.get("message", "")),
        str(data.get("hint", "")),
        fix=data.get("fix") or {},
        details=str(data.get("details", "")),
    )
