"""Writes two small DICOM series with pydicom, and what SimpleITK (GDCM) or the standard's formula make of them.

pip install pydicom==3.* SimpleITK nibabel numpy; python make.py      # run with pydicom 3.0, SimpleITK 2.5
"""
import json
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK
from nibabel.orientations import aff2axcodes
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

HERE = Path(__file__).parent
ROOT = "1.2.826.0.1.3680043.8.498."


def write(path, pixels, number, position, directions, syntax, attributes):
    """Writes one slice; `pixels` is (rows, columns)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"{ROOT}1.{number}"
    meta.TransferSyntaxUID = syntax
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{ROOT}1.{number}"
    data.Modality, data.PatientID = "CT", "PHANTOM"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.InstanceNumber = f"{ROOT}2", f"{ROOT}3", number
    # A sequence, so that nested lengths are met.
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "113691", "DCM", "phantom"
    data.ProcedureCodeSequence = pydicom.Sequence([item])
    data.Rows, data.Columns = pixels.shape
    data.PixelSpacing, data.SliceThickness = [0.7, 0.9], 5.0
    data.ImageOrientationPatient = [round(float(v), 6) for v in np.concatenate(directions)]
    data.ImagePositionPatient = [round(float(v), 6) for v in position]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 16
    for name, value in attributes.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def rotation(x, y, z):
    cx, sx, cy, sy, cz, sz = *np.array([np.cos(x), np.sin(x)]), *np.array([np.cos(y), np.sin(y)]), np.cos(z), np.sin(z)
    return (
        np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    )


def describe(affine_ras, voxels_kji):
    return {
        "affine": affine_ras.tolist(),
        "axcodes": "".join(aff2axcodes(affine_ras)),
        "shape": list(voxels_kji.shape),
        "voxels": voxels_kji.astype(int).ravel().tolist(),
    }


def oblique(generator):
    """Unsigned, 12 bits stored, explicit; file names do not follow positions. Read back by SimpleITK."""
    folder = HERE / "oblique"
    folder.mkdir(exist_ok=True)
    turn = rotation(0.1, -0.2, 0.3)
    pixels = generator.integers(0, 4096, (4, 5, 6)).astype("<u2")
    attributes = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024}
    for k, name in enumerate(["c", "a", "d", "b"]):
        position = np.array([-100.0, -80.0, 300.0]) + 2.5 * k * turn[:, 2]
        write(folder / f"{name}.dcm", pixels[k], k + 1, position, [turn[:, 0], turn[:, 1]], ExplicitVRLittleEndian, attributes)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return describe(np.diag([-1, -1, 1, 1]) @ lps, SimpleITK.GetArrayFromImage(image))


def tilted(generator):
    """Signed, implicit, slope 0.5, sagittal planes, each shifted within its plane as a tilted gantry does."""
    folder = HERE / "tilted"
    folder.mkdir(exist_ok=True)
    along_columns, along_rows = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -1.0])
    step = np.array([-3.0, 0.4, 0.0])
    pixels = generator.integers(-3000, 3000, (3, 4, 7)).astype("<i2")
    attributes = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "RescaleSlope": 0.5, "RescaleIntercept": 10}
    for k in range(3):
        position = np.array([40.0, -60.0, 200.0]) + k * step
        write(folder / f"{k}", pixels[k], k + 1, position, [along_columns, along_rows], ImplicitVRLittleEndian, attributes)
    # PS3.3, equation C.7.6.2.1-1, from the attributes as read back.
    first, last = (pydicom.dcmread(folder / str(k)) for k in (0, 2))
    row_mm, column_mm = map(float, first.PixelSpacing)
    lps = np.eye(4)
    lps[:3, 0] = np.array(first.ImageOrientationPatient[:3], float) * column_mm
    lps[:3, 1] = np.array(first.ImageOrientationPatient[3:], float) * row_mm
    lps[:3, 2] = (np.array(last.ImagePositionPatient, float) - np.array(first.ImagePositionPatient, float)) / 2
    lps[:3, 3] = np.array(first.ImagePositionPatient, float)
    read = [pydicom.dcmread(folder / str(k)) for k in range(3)]
    hu = np.stack([pydicom.pixels.apply_rescale(one.pixel_array, one) for one in read])
    return describe(np.diag([-1, -1, 1, 1]) @ lps, np.rint(hu))


generator = np.random.default_rng(7)
expected = {"oblique": oblique(generator), "tilted": tilted(generator)}
(HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
