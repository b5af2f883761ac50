"""The mark of synthetic media: what programs and people can tell a made image by.

IPTC's DigitalSourceType (the NewsCodes of cv.iptc.org/newscodes/digitalsourcetype) in an XMP packet, as
the EU's AI Act asks for a mark that machines can read and as image desks, search engines and
Content Credentials already look for one. It says that an image was made and by which program, never
from which words. Taking it out is easy: it informs, it does not protect.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from minikin import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

TRAINED = "trainedAlgorithmicMedia"  # all of it was made by a model
COMPOSITE = "compositeWithTrainedAlgorithmicMedia"  # made from an image that a model had no part in
NONE = ""  # a mask, a photo, a card of words: nothing that a model painted
KEY = "source_type"  # in records
INFO: Any = ("minikin", KEY)  # in the `info` of images on their way; no file has keys that are pairs
NAMESPACE = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
CODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PNG_KEY = "XML:com.adobe.xmp"
MAX_PACKET = 100_000  # bytes of a stranger's that are looked at
# as an attribute or as an element; a pattern and no parser, so there is nothing to expand or to resolve
_FOUND = re.compile(rf"DigitalSourceType\s*(?:=\s*[\"']|>\s*){re.escape(CODES)}(\w{{1,60}})")


def packet(source_type: str) -> str:
    """The XMP packet of an image made here; the same for the same version, so files can be compared."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f'xmlns:Iptc4xmpExt="{NAMESPACE}" xmp:CreatorTool="Minikin {__version__}" '
        f'Iptc4xmpExt:DigitalSourceType="{CODES}{source_type}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def source_type_of(image: Image) -> str | None:
    """What an open image says of its origin: a code of `CODES`; None when it says nothing.

    image  of PIL, opened from a file or on its way within Minikin (`made`)
    """
    told = image.info.get(INFO)
    if isinstance(told, str):
        return told
    raw = image.info.get("xmp") or image.info.get(PNG_KEY) or b""
    text = raw[:MAX_PACKET].decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)[:MAX_PACKET]
    found = _FOUND.search(text)
    return found[1] if found else None


def made(image: Image, source_type: str = TRAINED) -> Image:
    """The same image, which from now on says where it comes from, wherever it is written."""
    image.info[INFO] = source_type
    return image
