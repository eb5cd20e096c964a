"""Marks that say that a picture or video is synthetic, and how it was made.

The paper's supplement (A.5) asks for care with footage of people that never happened. So every result carries two
marks for machines: a comment in the file's own metadata, and an XMP packet with the term that the IPTC has for
media made by a trained algorithm. Both hold a manifest: the program, the model and its files' hashes, the run, the
prompt, the seed and the settings. Marks can be removed by anybody; they are for honest users.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image, PngImagePlugin

VERSION = "1.0.0"
SYNTHETIC = "Synthetic: made by PoseCrafter with a trained model, not recorded by a camera."
# https://cv.iptc.org/newscodes/digitalsourcetype
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "urn:posecrafter:provenance:"
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # Adobe's, XMP specification part 3
XMP_CHUNK = "XML:com.adobe.xmp"  # the PNG chunk that holds XMP
LONGEST_PACKET = 2**20  # bytes; longer ones are not ours

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:posecrafter="{namespace}">
<xmp:CreatorTool>PoseCrafter {version}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
<posecrafter:manifest>{manifest}</posecrafter:manifest>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


def comment(manifest: dict) -> str:
    """What the comment of a file says: that it is synthetic, then the manifest as JSON."""
    return f"{SYNTHETIC} {json.dumps(manifest)}"


def xmp_packet(manifest: dict) -> bytes:
    """The XMP packet of a file, UTF-8."""
    text = escape(json.dumps(manifest))
    packet = _PACKET.format(namespace=NAMESPACE, version=VERSION, source_type=SOURCE_TYPE, manifest=text)
    return packet.encode()


def png_marks(manifest: dict) -> PngImagePlugin.PngInfo:
    """The chunks that mark a PNG; give them to `Image.save` as `pnginfo`."""
    marks = PngImagePlugin.PngInfo()
    marks.add_text("Comment", comment(manifest))
    marks.add_itxt(XMP_CHUNK, xmp_packet(manifest).decode())
    return marks


def mark_video(path: Path, manifest: dict) -> None:
    """Adds the XMP packet to an MP4 or MOV file, as a box at its end, which players skip."""
    packet = XMP_UUID + xmp_packet(manifest)
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 8 + len(packet), b"uuid") + packet)


def boxes(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """The outermost boxes of an MP4 or MOV file: type, and where its contents begin and end."""
    end = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start + 8 <= end:
            file.seek(start)
            size, kind = struct.unpack(">I4s", file.read(8))
            header = 8
            if size == 1:  # the true size follows, in 64 bits
                size, header = int.from_bytes(file.read(8), "big"), 16
            size = size or end - start  # 0: up to the end of the file
            if size < header or start + size > end:
                return
            yield kind, start + header, start + size
            start += size


def read_manifest(path: Path) -> dict | None:
    """The manifest in a PNG, MP4 or MOV file; None where there is none.

    Raises OSError for a file that cannot be read, and ValueError for a damaged manifest.
    """
    packet = None
    if path.suffix.lower() == ".png":
        try:
            with Image.open(path) as image:
                packet = image.info.get(XMP_CHUNK)
        except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a readable image ({error})") from None
    else:
        with path.open("rb") as file:
            for kind, start, end in boxes(path):
                if kind == b"uuid" and 16 < end - start <= LONGEST_PACKET:
                    file.seek(start)
                    contents = file.read(end - start)
                    packet = contents[16:].decode(errors="replace") if contents[:16] == XMP_UUID else packet
    if packet is None:
        return None
    try:
        found = ElementTree.fromstring(packet).find(f".//{{{NAMESPACE}}}manifest")
        manifest = None if found is None else json.loads(found.text)
        if not isinstance(manifest, dict | None):
            raise ValueError("no manifest")
        return manifest
    except (ElementTree.ParseError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: its marks are damaged ({error})") from None


def file_hash(path: Path) -> str:
    """A file's SHA-256. Of a file in the hub's cache it is the name, so that nothing must be read."""
    path = path.resolve()
    if path.parent.name == "blobs" and len(path.name) == 64:
        return path.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
