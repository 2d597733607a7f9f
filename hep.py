"""Event files of high-energy physics: particles from HepMC3 and ROOT, responses to ROOT.

    python fm.py --load weights/fm-zn.eqx --generate pythia.hepmc --out zn.root --events sums.h5

Needs the extra [hep]: pyhepmc, uproot, awkward. Of a HepMC file (HepMC2 or 3, also gzipped) the final-state
particles of both sides are taken that lie as far forward as --min-eta says. A ROOT file holds a tree of
particles with the branches E, vx, vy, vz, px, py, pz in GeV and cm, mass in MeV, charge in e and, if known,
pdg, event and particle; `file.root:NAME` names one tree of several.
"""
import gzip

import numpy as np

import data
import files
from common import UserError
from simulator import FEATURES

THIRDS = np.array([0, -1, 2, -1, 2, -1, 2, 0, 0, 0])   # charges of the quarks d, u, s, c, b, t, in e / 3
DARK = 12, 14, 16                                      # neutrinos
NUCLEI = 10**9                                         # ids above it


def imported(name):
    """A library of the extra [hep]. UserError without it."""
    try:
        return __import__(name)
    except ModuleNotFoundError:
        raise UserError(f"event files need {name}: pip install -e '.[hep]'") from None


def is_event_file(path):
    """Does the name say HepMC or ROOT?"""
    return ".hepmc" in path.name or ".root" in path.name


def read(path, eta):
    """{"particles": float32 (N, 9), "pdg": (N,), "event": (N,), "particle": (N,)} of a file, the last two if
    a ROOT file has them. Neutrinos and nuclei are left out. UserError."""
    columns = read_tree(path) if ".root" in path.name else read_hepmc(path, eta)
    ids = np.abs(columns["pdg"])
    if nuclei := np.count_nonzero(ids > NUCLEI):
        print(f"{path}: {nuclei} nuclei are left out, no model has seen one")
    kept = (ids <= NUCLEI) & ~np.isin(ids, DARK)
    columns = {name: column[kept] for name, column in columns.items()}
    return columns | {"particles": data.check_particles(path, columns["particles"])}


# ------------------------------------------------------------------------------------------------------ HepMC

def charges(pdg):
    """Charges in e of PDG ids (N,), from the digits of their quarks [PDG, Monte Carlo numbering]."""
    a = np.abs(pdg)
    one, two, three = (THIRDS[a // k % 10] for k in (1000, 100, 10))
    down = a // 100 % 10 % 2 == 1                                              # K+ is 321, of u and anti-s
    found = np.where(a // 1000 % 10 > 0, one + two + three, np.where(down, three - two, two - three))
    found = np.where(a < 100, np.isin(a, (11, 13, 15)) * -3 + np.isin(a, (24,)) * 3, found)
    return np.sign(pdg) * found / 3


def check_listing(path):
    """The numbers of events and particles that a HepMC file lists. UserError if it is none or was cut off."""
    events, particles, last = 0, 0, b""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")         # before it, HepMC2 has a blank
            for line in file:
                events += line.startswith(b"E ")
                particles += line.startswith(b"P ")
                last = line if line.strip() else last
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: expected a HepMC file, {getattr(error, 'strerror', '') or error}") from None
    if not first.startswith(b"HepMC::Version"):
        raise UserError(f"{path}: expected a HepMC file, which begins with HepMC::Version")
    if b"END_EVENT_LISTING" not in last:
        raise UserError(f"{path}: cut off, expected a last line with END_EVENT_LISTING")
    return events, particles


def read_hepmc(path, eta):
    """Final-state particles of all events with a |pseudorapidity| of at least `eta`, numbered as in the
    file, or if it repeats a number, events from 0."""
    pyhepmc, (events, listed) = imported("pyhepmc"), check_listing(path)
    for name in ("print_errors", "print_warnings", "debug_level"):             # ours is the one line
        setattr(pyhepmc.Setup, name, 0)
    found, seen, numbers = [], 0, []
    with pyhepmc.open(str(path)) as file:
        for _ in range(events):
            if not (event := file.read()):                                     # an empty one, or damage
                continue
            event.set_units(pyhepmc.Units.MomentumUnit.GEV, pyhepmc.Units.LengthUnit.CM)
            seen += len(event.particles)
            numbers.append(event.event_number)
            for particle in event.particles:
                p = particle.momentum
                forward = abs(p.pz) >= np.sinh(eta) * p.pt()
                if particle.status != 1 or not forward:
                    continue
                vertex = particle.production_vertex
                place = vertex.position if vertex else event.event_pos()
                mass = 0.0 if particle.pid == 22 else 1000 * particle.generated_mass
                found.append((p.e, place.x, place.y, place.z, p.px, p.py, p.pz, mass, particle.pid,
                              len(numbers) - 1, particle.id))
    if seen != listed:
        raise UserError(f"{path}: damaged, {seen} of {listed} particles could be read")
    if not found:
        raise UserError(f"{path}: no particle with |eta| of --min-eta {eta:g} or more in {events} events")
    if len(set(numbers)) < len(numbers):
        print(f"{path}: numbers of events repeat, they are numbered from 0 as they come")
        numbers = range(len(numbers))
    table = np.array(found)
    pdg = table[:, 8].astype(np.int32)
    return {"particles": np.column_stack([table[:, :8], charges(pdg)]), "pdg": pdg,
            "event": np.array(numbers, np.int64)[table[:, 9].astype(int)],
            "particle": table[:, 10].astype(np.int32)}


# ------------------------------------------------------------------------------------------------------- ROOT

def read_tree(path):
    """Particles of a tree, one in each entry."""
    uproot, (name, _, tree) = imported("uproot"), str(path).partition(".root:")
    try:
        file = uproot.open(name if name.endswith(".root") else f"{name}.root")
        trees = [key.split(";")[0] for key, kind in file.classnames().items() if kind == "TTree"]
        tree = tree or (trees[0] if len(set(trees)) == 1 else "")
        if tree not in trees:
            raise UserError(f"{path}: expected one tree, or FILE.root:TREE, of {', '.join(trees) or 'none'}")
        if missing := [key for key in FEATURES if key not in file[tree]]:
            raise UserError(f"{path}: the tree {tree} has no branch {missing[0]}, "
                            f"expected {', '.join(FEATURES)}")
        known = [key for key in (*FEATURES, "pdg", "event", "particle") if key in file[tree]]
        table = file[tree].arrays(known, library="np")
    except UserError:
        raise
    except Exception as error:   # uproot raises nearly every type of error on a damaged file
        raise UserError(f"{path}: expected a ROOT file, {error}") from None
    if ragged := [key for key in known if table[key].dtype.kind not in "iuf" or table[key].ndim > 1]:
        raise UserError(f"{path}: branch {ragged[0]} is not one number for each entry")
    particles = np.stack([table[key] for key in FEATURES], axis=1)
    numbers = {key: table[key].astype(np.int64) for key in ("event", "particle") if key in table}
    return {"particles": particles, "pdg": data.check_pdg(path, table.get("pdg"), particles)} | numbers


BRANCHES = {"event": "int64", "particle": "int32", "side": "int8", "pdg": "int32",
            "channels": ("float32", (5,))}


def save_tree(path, total, blocks, **attributes):
    """Stream `blocks` (see lists.write) into a tree `responses`, an entry for each response: its numbers, the
    five channels and the lit fibres as jagged arrays fibre_x, fibre_y and fibre_photons; all or nothing."""
    uproot, ak = imported("uproot"), imported("awkward")
    with files.write_atomic(path) as temporary, uproot.recreate(temporary) as file:
        for block in blocks:
            rows, x, y = block["responses"].nonzero()
            lit = ak.zip({"x": x.astype(np.uint8), "y": y.astype(np.uint8),
                          "photons": block["responses"][rows, x, y]})
            counts = np.bincount(rows, minlength=len(block["responses"]))
            columns = {name: block.get(name, np.zeros(len(counts), np.int64)) for name in BRANCHES}
            columns |= {"side": np.sign(block["particles"][:, 6]).astype(np.int8),
                        "channels": block["channels"].astype(np.float32), "fibre": ak.unflatten(lit, counts)}
            if "responses" not in file:
                tree = file.mktree("responses", BRANCHES | {"fibre": columns["fibre"].type})
            tree.extend(columns)
        file["about"] = ", ".join(f"{name} {value}" for name, value in attributes.items())


def event_sums(event, particles, channels):
    """{"event", "side" (1 where pz > 0, else -1), "channels" float32 (M, 5), "particles": how many} of both
    sides of each event with a particle in the list, from channels (N, 5) of single particles."""
    events, which = np.unique(event, return_inverse=True)
    place = which, (particles[:, 6] > 0).astype(int)
    total, many = np.zeros((len(events), 2, 5)), np.zeros((len(events), 2), np.int32)
    np.add.at(total, place, channels)
    np.add.at(many, place, 1)
    return {"event": events.repeat(2), "side": np.tile(np.int8([-1, 1]), len(events)),
            "channels": total.reshape(-1, 5).astype(np.float32), "particles": many.ravel()}
