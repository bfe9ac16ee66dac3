"""The values of `format` that answers are held to."""

from __future__ import annotations

from jinn.text.grammar.bounds import SAFE_INTEGER

_DATE = (
    r"([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))"
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
_LABEL = "[a-zA-Z0-9]{1,20}(-[a-zA-Z0-9]{1,20}){0,2}"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,2}}"
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,31}"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
# Formats by patterns of our own, where llguidance's are wider than the format; None where its own serves.
FORMATS: dict[str, str | None] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": None,
    "email": rf"^{_ATOM}(\.{_ATOM})?@{_HOST}\.[a-zA-Z]{{2,20}}$",
    "hostname": rf"^({_LABEL}\.){{0,2}}[a-zA-Z]([a-zA-Z0-9]{{0,20}})$",
    "ipv4": None,
    "ipv6": None,
    "uuid": None,
    "uri": None,
}
# The bounds of number formats, where they have any.
NUMBER_FORMATS: dict[str, int | None] = {
    "int32": 2**31 - 1,
    "int64": SAFE_INTEGER,
    "float": None,
    "double": None,
}
