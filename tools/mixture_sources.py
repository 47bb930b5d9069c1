"""The Debian packages of the mixture: a table of their licences, readers and splits.

Train and validation have manuals, most of software. Unseen has texts on other subjects: games,
religion, politics and law, science, music, hobbies; and collections of sayings.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tools.extract import Pages, commentary, dictionary, man_pages, manual, pods, sayings, texts

# Folders and pages that are no text to read.
NO_TEXT = "index doc-index genindex search toc tags _modules _sources changelog changes releases? "
NO_TEXT += "whatsnew news"
SKIPPED = rf"(^|/)({'|'.join(NO_TEXT.split())})([^a-z/][^/]*)?(/|$)"


class Source(NamedTuple):
    """Describes a Debian package of the mixture.

    licence: of its text, as its copyright file states it. group: of `make_mixture.LICENCES`.
    """

    licence: str
    group: str
    read: Callable[[Path], Pages] = partial(manual, drop=SKIPPED)
    split: str = "train"


def english(keep: str, ending: str = ".html") -> Callable[[Path], Pages]:
    """Returns a reader of the HTML pages of one language or part, by their path below usr/share."""
    return partial(manual, keep=f"usr/share/{keep}", drop=SKIPPED, ending=ending)


def files(keep: str) -> Callable[[Path], Pages]:
    """Returns a reader of the plain text files whose path matches `keep`."""
    return partial(texts, keep=keep)


# By package. (Not dict-foldoc: it contains a third of the Jargon File, which is unseen.)
SOURCES = {
    "ada-reference-manual-2012": Source("GPL-3+", "copyleft"),
    "apache2-doc": Source("Apache-2.0", "permissive", english("doc/apache2-doc/manual/en/.*")),
    "debian-handbook": Source(
        "GPL-2+ or CC-BY-SA-3.0", "copyleft", english("doc/debian-handbook/html/en-US/.*")
    ),
    "debian-policy": Source("GPL-2+", "copyleft"),
    "developers-reference": Source("GPL-2+", "copyleft"),
    "dict-gcide": Source("GPL-3+", "copyleft", dictionary),
    "dict-wn": Source("WordNet-3.0", "permissive", dictionary),
    "erlang-doc": Source("Apache-2.0", "permissive"),
    "freebsd-manpages": Source("BSD-2-Clause and BSD-4-Clause", "permissive", man_pages),
    "ghc-doc": Source("BSD-3-Clause", "permissive"),
    "git-doc": Source("GPL-2", "copyleft"),
    "installation-guide-amd64": Source(
        "GPL-2", "copyleft", english("doc/installation-guide-amd64/en/.*")
    ),
    "kicad-doc-en": Source("GPL-3+", "copyleft"),
    "libboost1.81-doc": Source("BSL-1.0", "permissive"),
    "libreoffice-help-en-us": Source("MPL-2.0", "copyleft"),
    "lilypond-doc-html": Source(
        "GPL-3+", "copyleft", english(r"doc/lilypond/html/Documentation/[^.]*\.html")
    ),
    "linux-doc-6.1": Source(
        "GPL-2", "copyleft", english(r"doc/linux-doc-6.1/html/(?!translations/).*")
    ),
    "llvm-14-doc": Source("Apache-2.0 with LLVM exceptions", "permissive"),
    "manpages": Source("GPL-2+ and others", "copyleft", man_pages),
    "manpages-dev": Source("GPL-2+ and others", "copyleft", man_pages),
    "maxima-doc": Source("GPL-2", "copyleft", english("doc/maxima-doc/html/.*")),
    "nodejs-doc": Source("MIT", "permissive"),
    "octave-doc": Source("GPL-3+", "copyleft"),
    "openjdk-17-doc": Source("GPL-2 with Classpath exception", "copyleft"),
    "perl-doc": Source("GPL-1+ or Artistic", "copyleft", pods),
    "postgis-doc": Source("GPL-2+", "copyleft"),
    "postgresql-doc-15": Source("PostgreSQL", "permissive"),
    "python-django-doc": Source("BSD-3-Clause", "permissive"),
    "python-pandas-doc": Source("BSD-3-Clause", "permissive"),
    "python-scipy-doc": Source("BSD-3-Clause", "permissive"),
    "python-sklearn-doc": Source("BSD-3-Clause", "permissive"),
    "python-sqlalchemy-doc": Source("MIT", "permissive"),
    "python-sympy-doc": Source("BSD-3-Clause", "permissive"),
    "python3.11-doc": Source("PSF-2", "permissive"),
    "qtbase5-doc-html": Source("LGPL-3 or GPL-2", "copyleft"),
    "racket-doc": Source("LGPL-2.1+", "copyleft"),
    "rust-doc": Source(
        "MIT or Apache-2.0",
        "permissive",
        english(r"doc/rust-doc/html/(?!src/|core/arch|std/arch).*"),
    ),
    "sagemath-doc": Source("GPL-2+", "copyleft", english("doc/sagemath/html/en/.*")),
    "sbcl-doc": Source("public domain", "public_domain"),
    "sqlite3-doc": Source("public domain", "public_domain"),
    "swi-prolog-doc": Source("BSD-2-Clause", "permissive"),
    "vim-doc": Source("Vim", "permissive"),
    "alpine-doc": Source("Apache-2.0", "permissive", split="validation"),
    "aptitude-doc-en": Source("GPL-2+", "copyleft", split="validation"),
    "argyll-doc": Source("MIT", "permissive", split="validation"),
    "aspell-doc": Source("GFDL-1.2+", "copyleft", split="validation"),
    "beets-doc": Source("MIT", "permissive", split="validation"),
    "bind9-doc": Source("MPL-2.0", "copyleft", split="validation"),
    "bird2-doc": Source("GPL-2+", "copyleft", split="validation"),
    "bisonc++-doc": Source("GPL-2+", "copyleft", split="validation"),
    "blends-doc": Source("GPL-2+", "copyleft", split="validation"),
    "bochs-doc": Source("LGPL-2+", "copyleft", split="validation"),
    "borgbackup-doc": Source("BSD-3-Clause", "permissive", split="validation"),
    "brz-doc": Source("GPL-2+", "copyleft", split="validation"),
    "buildbot-doc": Source("GPL-2", "copyleft", split="validation"),
    "c++-annotations-html": Source("GPL-2+", "copyleft", split="validation"),
    "ceres-solver-doc": Source("BSD-3-Clause", "permissive", split="validation"),
    "charliecloud-doc": Source("Apache-2.0", "permissive", split="validation"),
    "chezscheme-doc": Source("Apache-2.0", "permissive", split="validation"),
    "cmake-doc": Source("BSD-3-Clause", "permissive", split="validation"),
    "cockpit-doc": Source("LGPL-2.1+", "copyleft", split="validation"),
    "courier-doc": Source("GPL-3+", "copyleft", split="validation"),
    "cython-doc": Source("Apache-2.0", "permissive", split="validation"),
    "dbus-1-doc": Source("GPL-2+ or AFL-2.1", "copyleft", split="validation"),
    "debian-faq": Source("GNU manual", "copyleft", split="validation"),
    "debian-reference-en": Source("GPL-2+", "copyleft", split="validation"),
    "denemo-doc": Source("CC-BY-SA-3.0", "copyleft", split="validation"),
    "dita-ot-doc": Source("Apache-2.0", "permissive", split="validation"),
    "docutils-doc": Source("public domain", "public_domain", split="validation"),
    "drbd-doc": Source("CC-BY-SA-3.0", "copyleft", split="validation"),
    "ecasound-doc": Source("GPL-2+", "copyleft", split="validation"),
    "exim4-doc-html": Source("GPL-2+", "copyleft", split="validation"),
    "fai-doc": Source("GPL-2+", "copyleft", split="validation"),
    "festival-doc": Source("MIT-like", "permissive", split="validation"),
    "frr-doc": Source("GNU manual", "copyleft", split="validation"),
    "ganeti-doc": Source("BSD-2-Clause", "permissive", split="validation"),
    "gap-doc": Source("GPL-2+", "copyleft", split="validation"),
    "gettext-doc": Source("GFDL-1.2+", "copyleft", split="validation"),
    "gpsbabel-doc": Source("GPL-2+", "copyleft", split="validation"),
    "graphviz-doc": Source("EPL-1.0", "copyleft", split="validation"),
    "grub-legacy-doc": Source("GPL-2+", "copyleft", split="validation"),
    "harden-doc": Source("GPL-2", "copyleft", english("doc/harden-doc/.*en-.*"), "validation"),
    "homebank-data": Source("GPL-2+", "copyleft", split="validation"),
    "htdig-doc": Source("GPL-2", "copyleft", split="validation"),
    "httrack-doc": Source("GPL-3+", "copyleft", split="validation"),
    "idzebra-2.0-doc": Source("GPL-2+", "copyleft", split="validation"),
    "iproute2": Source("GPL-2", "copyleft", man_pages, "validation"),
    "keepass2-doc": Source("GPL-2+", "copyleft", split="validation"),
    "kitty-doc": Source("GPL-3", "copyleft", split="validation"),
    "krb5-doc": Source("MIT-like", "permissive", split="validation"),
    "libcatalyst-manual-perl": Source("GPL-1+ or Artistic", "copyleft", pods, "validation"),
    "libforms-doc": Source("LGPL-2.1", "copyleft", split="validation"),
    "libgcrypt20-doc": Source("LGPL-2.1+", "copyleft", split="validation"),
    "libmoose-perl": Source("GPL-1+ or Artistic", "copyleft", pods, "validation"),
    "libmpfr-doc": Source("GFDL-1.2+", "copyleft", split="validation"),
    "libpoe-perl": Source("GPL-1+ or Artistic", "copyleft", man_pages, "validation"),
    "libssl-doc": Source("Apache-2.0", "permissive", man_pages, "validation"),
    "lmod-doc": Source("MIT", "permissive", split="validation"),
    "maint-guide": Source("GPL-2+", "copyleft", split="validation"),
    "mapproxy-doc": Source("Apache-2.0", "permissive", split="validation"),
    "mira-doc": Source("GPL-2+", "copyleft", split="validation"),
    "mit-scheme-doc": Source("GFDL-1.2+", "copyleft", split="validation"),
    "mkdocs-doc": Source("BSD-2-Clause", "permissive", split="validation"),
    "mma": Source("GPL-2+", "copyleft", split="validation"),
    "ncurses-doc": Source("MIT", "permissive", man_pages, "validation"),
    "nsis-doc": Source("Zlib", "permissive", split="validation"),
    "ntpsec-doc": Source("NTP", "permissive", split="validation"),
    "nut-doc": Source("GPL-2+", "copyleft", split="validation"),
    "nyquist": Source("BSD-3-Clause", "permissive", split="validation"),
    "omniorb-doc": Source("LGPL-2+", "copyleft", split="validation"),
    "openafs-doc": Source("IPL-1.0", "copyleft", split="validation"),
    "openssh-client": Source("BSD-2-Clause and others", "permissive", man_pages, "validation"),
    "openvswitch-doc": Source("Apache-2.0", "permissive", split="validation"),
    "pdl": Source("GPL-1+ or Artistic", "copyleft", pods, "validation"),
    "pelican-doc": Source("AGPL-3", "copyleft", split="validation"),
    "png-definitive-guide": Source("GFDL-1.1+", "copyleft", split="validation"),
    "postfix-doc": Source("EPL-2.0 or IPL-1.0", "copyleft", split="validation"),
    "proftpd-doc": Source("GPL-2+", "copyleft", split="validation"),
    "proofgeneral-doc": Source("GPL-2+", "copyleft", split="validation"),
    "putty-doc": Source("MIT", "permissive", split="validation"),
    "pypy3-doc": Source("MIT", "permissive", split="validation"),
    "pyro4-doc": Source("MIT", "permissive", split="validation"),
    "python-click-doc": Source("BSD-3-Clause", "permissive", split="validation"),
    "python-gevent-doc": Source("MIT", "permissive", split="validation"),
    "python-hypothesis-doc": Source("MPL-2.0", "copyleft", split="validation"),
    "python-jinja2-doc": Source("BSD-3-Clause", "permissive", split="validation"),
    "python-setuptools-doc": Source("MIT", "permissive", split="validation"),
    "python-tornado-doc": Source("Apache-2.0", "permissive", split="validation"),
    "python-whoosh-doc": Source("BSD-2-Clause", "permissive", split="validation"),
    "rsyslog-doc": Source("GPL-3+ and Apache-2.0", "copyleft", split="validation"),
    "scons-doc": Source("MIT", "permissive", split="validation"),
    "snakemake-doc": Source("MIT", "permissive", split="validation"),
    "sphinx-doc": Source("BSD-2-Clause", "permissive", split="validation"),
    "splint-doc-html": Source("CC-BY-SA-3.0", "copyleft", split="validation"),
    "supervisor-doc": Source("BSD-3-Clause-like", "permissive", split="validation"),
    "systemd": Source("LGPL-2.1+", "copyleft", man_pages, "validation"),
    "telepathy-specification": Source("LGPL-2.1+", "copyleft", split="validation"),
    "texstudio-doc": Source("GPL-2+", "copyleft", split="validation"),
    "tkgate-doc": Source("GPL-2+", "copyleft", split="validation"),
    "tomcat10-docs": Source("Apache-2.0", "permissive", split="validation"),
    "tuxpaint-data": Source("GPL-2+", "copyleft", english("doc/tuxpaint-data/en/.*"), "validation"),
    "user-mode-linux-doc": Source("GFDL-1.1+", "copyleft", split="validation"),
    "vala-0.56-doc": Source("CC-BY-SA-4.0", "copyleft", split="validation"),
    "varnish-doc": Source("BSD-2-Clause", "permissive", split="validation"),
    "xapian-doc": Source("GPL-2+", "copyleft", split="validation"),
    "xorg-docs": Source("MIT", "permissive", split="validation"),
    "yodl-doc": Source("GPL-2+", "copyleft", split="validation"),
    "yorick-doc": Source("BSD-3-Clause", "permissive", split="validation"),
    "yoshimi-doc": Source("GPL-2+", "copyleft", split="validation"),
    "zoneminder-doc": Source("GPL-2+", "copyleft", split="validation"),
    "zsh-doc": Source("MIT-like", "permissive", split="validation"),
    "anarchism": Source("GPL-2", "copyleft", split="unseen"),
    "bsdgames": Source("BSD-3-Clause", "permissive", man_pages, "unseen"),
    "cfi-en": Source("public domain", "public_domain", english(".*", ending=".htm"), "unseen"),
    "crawl-common": Source(
        "GPL-2+",
        "copyleft",
        files(r"usr/share/crawl/(docs/.*(manual|guide|start|FAQ)|dat/descript/[a-z]*)\.txt"),
        "unseen",
    ),
    "crrcsim-doc": Source("GPL-2", "copyleft", split="unseen"),
    "dict-devil": Source("public domain", "public_domain", dictionary, "unseen"),
    "dict-elements": Source("public domain", "public_domain", files(r".*\.dict\.dz"), "unseen"),
    "dict-jargon": Source("public domain", "public_domain", dictionary, "unseen"),
    "display-dhammapada": Source(
        "public domain", "public_domain", files(".*/dhammapada-(english|alternate).*"), "unseen"
    ),
    "doc-debian": Source(
        "GPL and OPL-1.0",
        "copyleft",
        files(r"usr/share/doc/debian/(?!constitution\.\d).*"),  # the present constitution alone
        "unseen",
    ),
    "dopewars-data": Source("GPL-2+", "copyleft", split="unseen"),
    "enigma-doc": Source("GPL-2+", "copyleft", english("doc/.*/enigma.html"), "unseen"),
    "fortune-anarchism": Source("public domain", "public_domain", sayings, "unseen"),
    "fortunes": Source("BSD-4-Clause collection", "permissive", sayings, "unseen"),
    "geotranz-help": Source("GEOTRANS", "permissive", english(".*", ending=".htm"), "unseen"),
    "gnugo": Source("GFDL", "copyleft", split="unseen"),
    "lifelines-doc": Source("MIT", "permissive", split="unseen"),
    "liquidwar-data": Source("GPL-2+", "copyleft", split="unseen"),
    "miscfiles": Source("public domain", "public_domain", files("usr/share/state/us-.*"), "unseen"),
    "nethack-common": Source("NGPL", "copyleft", files(".*/Guidebook.*"), "unseen"),
    "phylip-doc": Source("BSD-2-Clause", "permissive", split="unseen"),
    "qbrew": Source("BSD-2-Clause", "permissive", split="unseen"),
    "sgt-puzzles": Source("MIT", "permissive", english("sgt-puzzles/help/en/.*"), "unseen"),
    "solfege-doc": Source("GPL-3+", "copyleft", english("doc/solfege/help/C/.*"), "unseen"),
    "sword-comm-mhcc": Source("public domain", "public_domain", commentary, "unseen"),
    "sword-comm-scofield": Source("public domain", "public_domain", commentary, "unseen"),
    "sword-comm-tdavid": Source("public domain", "public_domain", commentary, "unseen"),
    "wsjtx-doc": Source("GPL-3", "copyleft", split="unseen"),
    "xboard": Source("GPL-3+", "copyleft", split="unseen"),
    "xtrkcad-common": Source("GPL-2+", "copyleft", split="unseen"),
}
