"""The table reader, used as a new user would: a CSV and a folder of photographs."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from asl.data.readers.table import read_table, splits, table
from asl.errors import DataError, UsageError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rows(data):
    return dict(zip([name.decode() for name in data.files], data.dense().tolist(), strict=True))


def test_names_in_one_column(tmp_path):
    text = "path,labels,split\na.jpg,dog|cat,train\nb/c.png,,train\nd.jpg, ant | cat ,val\n"
    path = write(tmp_path / "labels.csv", text)
    data = table(path, "train")
    assert data.classes == ("ant", "cat", "dog")
    assert rows(data) == {"a.jpg": [0, 1, 1], "b/c.png": [0, 0, 0]}
    assert rows(table(tmp_path, "val")) == {"d.jpg": [1, 1, 0]}
    assert data.path(1) == f"{tmp_path}/b/c.png"
    assert table(path, "val", image_folder="photos").path(0) == f"{tmp_path}/photos/d.jpg"
    assert splits(path) == splits(tmp_path) == ["train", "val"]


def test_one_column_per_class(tmp_path):
    text = "split,filename,dog,cat\ntrain,a.jpg,1,0\ntrain,b.jpg,-1,1.0\n\nval,c.jpg,,0.0\n"
    path = write(tmp_path / "labels.csv", text)
    data = table(path, "train")
    assert data.classes == ("dog", "cat")
    assert rows(data) == {"a.jpg": [1, 0], "b.jpg": [-1, 1]}
    assert rows(table(path, "val")) == {"c.jpg": [-1, 0]}


@pytest.mark.parametrize("marks", ["True,False,TRUE", "true,false,1", "1,0,True"])
def test_cells_may_be_true_and_false(tmp_path, marks):
    path = write(tmp_path / "t.csv", f"path,split,a,b,c\nx.jpg,train,{marks}\n")
    assert table(path, "train").labels(0).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["label", "Labels", "tags", "Class"])
@pytest.mark.parametrize("cell", ["cat|dog", "1"])
def test_a_column_that_is_called_nearly_labels_is_pointed_out(tmp_path, name, cell):
    path = write(tmp_path / "t.csv", f"path,split,{name}\nx.jpg,train,{cell}\n")
    with pytest.raises(DataError, match=f"t.csv: column {name} would be the only class: call it l"):
        table(path, "train")


def test_names_in_a_column_that_is_called_nearly_labels_are_pointed_out(tmp_path):
    hint = r"Names of classes belong in a column called labels$"
    path = write(tmp_path / "t.csv", "path,split,cat,tags\nx.jpg,train,1,0\ny.jpg,train,1,big\n")
    with pytest.raises(DataError, match=rf"row 3, column tags: 'big' is not from 0 .*\. {hint}"):
        table(path, "train")
    frame = pl.DataFrame({"path": ["x"], "cat": [1], "tags": [["a", "b"]]})
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=rf"column tags is of type .*\. {hint}"):
        table(tmp_path / "t.parquet", "train")


def test_a_class_may_be_called_label_beside_others(tmp_path):
    path = write(tmp_path / "t.csv", "path,split,bottle,label\nx.jpg,train,1,0\n")
    assert table(path, "train").classes == ("bottle", "label")


@pytest.mark.parametrize("column", ["row", "file: row"])
def test_a_class_may_have_any_name_that_the_table_has(tmp_path, column):
    path = write(tmp_path / "t.csv", f"path,split,{column}\nx.jpg,train,1\n")
    assert table(path, "train").classes == (column,)


def test_a_wrong_path_is_named_by_its_own_file_and_row(tmp_path):
    write(tmp_path / "a.csv", "path,labels\nx.jpg,cat\n")
    write(tmp_path / "b.csv", "path,labels\n\nx.jpg,cat\n,\ny.jpg,cat\nx.jpg,dog\n")
    with pytest.raises(DataError, match=r"b.csv: row 6: 'x.jpg' is already at .*b.csv: row 3$"):
        table(tmp_path, "b")
    pl.DataFrame({"path": ["x.jpg", "x.jpg"], "labels": "cat"}).write_parquet(
        tmp_path / "b.parquet"
    )
    write(tmp_path / "b.csv", "path,labels\ny.jpg,cat\n")
    with pytest.raises(DataError, match=r"b.parquet: row 2: 'x.jpg' is already at .*: row 1$"):
        table(tmp_path, "b")


@pytest.mark.parametrize(("cells", "implied"), [("0,0,1", 0), ("-1,,1", -1), ("1,1,1", 0)])
def test_the_commoner_value_is_implied(tmp_path, cells, implied):
    path = write(tmp_path / "t.csv", f"path,split,a,b,c\nx.jpg,train,{cells}\n")
    data = table(path, "train")
    assert data.implied == implied
    expected = [int(cell or -1) for cell in cells.split(",")]
    assert data.labels(0).tolist() == expected


def test_tables_of_their_own_share_the_classes(tmp_path):
    write(tmp_path / "train.csv", "path,labels\na.jpg,cat|dog\n")
    write(tmp_path / "val.csv", "path,labels\na.jpg,ant\n")
    assert splits(tmp_path) == ["train", "val"]
    assert rows(table(tmp_path, "train")) == {"a.jpg": [0, 1, 1]}
    assert rows(table(tmp_path, "val")) == {"a.jpg": [1, 0, 0]}


def test_a_single_table_named_like_a_split_is_that_split(tmp_path):
    write(tmp_path / "test.csv", "path,labels\na.jpg,cat\nb.jpg,dog\n")
    assert splits(tmp_path) == ["test"]
    assert len(table(tmp_path, "test")) == 2


def test_a_class_that_one_table_has_no_column_for_is_not_annotated_there(tmp_path):
    write(tmp_path / "train.csv", "path,cat,dog\na.jpg,1,0\n")
    write(tmp_path / "val.csv", "path,dog,ant\na.jpg,1,0\n")
    assert table(tmp_path, "val").classes == ("cat", "dog", "ant")
    assert rows(table(tmp_path, "train")) == {"a.jpg": [1, 0, -1]}
    assert rows(table(tmp_path, "val")) == {"a.jpg": [-1, 1, 0]}


@pytest.mark.parametrize("labels", [["a", "b"], "a|b"])
def test_parquet_is_read_like_csv(tmp_path, labels):
    frame = pl.DataFrame({"image": ["x.jpg", "y.jpg"], "labels": [labels, None], "split": "train"})
    frame.write_parquet(tmp_path / "t.parquet")
    assert rows(table(tmp_path, "train")) == {"x.jpg": [1, 1], "y.jpg": [0, 0]}


@pytest.mark.parametrize("mark", [";", "\t"])
def test_semicolons_and_tabs_may_stand_between_cells(tmp_path, mark):
    text = "path,split,a,b\nx.jpg,train,1,0\ny.jpg,train,,-1\n"
    name = "t.tsv" if mark == "\t" else "t.csv"
    write(tmp_path / name, text.replace(",", mark))
    assert splits(tmp_path) == ["train"]
    assert rows(table(tmp_path, "train")) == {"x.jpg": [1, 0], "y.jpg": [-1, -1]}


def test_the_delimiter_is_the_one_that_makes_a_column_of_paths(tmp_path):
    path = write(tmp_path / "t.csv", "path,a;b;c,split\nx.jpg,1,train\n")
    assert table(path, "train").classes == ("a;b;c",)
    path = write(tmp_path / "t.csv", 'path;"a, b, c";split\nx.jpg;1;train\n')
    assert table(path, "train").classes == ("a, b, c",)


def test_soft_labels_are_trained_on_as_they_are_and_counted_from_a_half_on(tmp_path):
    text = "path,split,a,b,c\nx.jpg,train,0.7,0,\ny.jpg,train,0.5,1,0.4\nz.jpg,val,1,1,0\n"
    path = write(tmp_path / "t.csv", text)
    data = table(path, "train")
    assert data.soft
    for part in (data, data.subset([1, 0]).subset([1, 0])):
        np.testing.assert_array_equal(part.labels(0), np.float32([0.7, 0, -1]))
        np.testing.assert_array_equal(part.labels(1), np.float32([0.5, 1, 0.4]))
        assert part.dense().tolist() == part.hard().dense().tolist() == [[1, 0, -1], [1, 1, 0]]
        assert [part.counts(value).tolist() for value in (1, 0, -1)] == [
            *([2, 1, 0], [0, 1, 1], [0, 0, 1])
        ]
        assert part.present(1).tolist() == [0, 1]
    picked = data.with_classes([2, 0], ["C", "A"])
    np.testing.assert_array_equal(picked.labels(1), np.float32([0.4, 0.5]))
    assert not table(path, "val").soft
    assert table(path, "val").labels(0).dtype == np.int8


@pytest.mark.parametrize("row", ["x;0,25;train", "x;.25;train", "x;2.5e-1;train"])
def test_numbers_may_be_written_as_spreadsheets_do(tmp_path, row):
    path = write(tmp_path / "t.csv", f"path;a;split\n{row}\n")
    assert table(path, "train").labels(0).tolist() == [0.25]


def test_a_table_of_soft_labels_goes_beside_one_of_hard_ones(tmp_path):
    write(tmp_path / "train.csv", "path,cat,dog\na.jpg,1,0.5\n")
    write(tmp_path / "val.csv", "path,dog,ant\na.jpg,1,0\n")
    assert table(tmp_path, "train").labels(0).tolist() == [1, 0.5, -1]
    assert table(tmp_path, "val").labels(0).tolist() == [-1, 1, 0]


def test_the_splits_are_looked_up_without_reading_the_labels(tmp_path, monkeypatch):
    path = write(tmp_path / "t.csv", "path;labels;split\na.jpg;cat|dog;train\n\nb.jpg;;val\n")
    pl.read_csv(path, separator=";").write_parquet(tmp_path / "t.parquet")
    columns = []

    def noted(path, only=None):
        found = read_table(path, only)
        columns.append(found.cells.columns)
        return found

    monkeypatch.setattr("asl.data.readers.table.read_table", noted)
    for file in (path, tmp_path / "t.parquet"):
        assert splits(file) == ["train", "val"]
    assert columns == [["split"], ["split"]]


def test_parquet_columns_may_be_of_any_number_type(tmp_path):
    frame = pl.DataFrame(
        {"path": ["x", "y"], "a": [True, False], "b": [1.0, None], "c": [-1, 1], "split": "train"}
    )
    frame.write_parquet(tmp_path / "t.parquet")
    assert rows(table(tmp_path, "train")) == {"x": [1, 1, -1], "y": [0, -1, 1]}


def test_parquet_categories_and_numbers_count_as_text(tmp_path):
    frame = pl.DataFrame({"path": [3, 4], "labels": [7, 8], "split": ["1", "1"]})
    frame = frame.with_columns(pl.col("split").cast(pl.Categorical))
    frame.write_parquet(tmp_path / "t.parquet")
    data = table(tmp_path, "1")
    assert data.classes == ("7", "8")
    assert rows(data) == {"3": [1, 0], "4": [0, 1]}


@pytest.mark.parametrize(
    "column",
    [
        {"path": [["x"]]},
        {"path": [b"\xff"]},
        {"cat": [[1]]},
        {"cat": [{"a": 1}]},
        {"labels": [[[1]]]},
    ],
    ids=str,
)
def test_parquet_columns_of_another_type_are_named(tmp_path, column):
    pl.DataFrame({"path": ["x"], **column}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=rf"t.parquet: column {next(iter(column))} is of type \w+"):
        table(tmp_path, "train")


def test_tables_of_both_forms_do_not_mix(tmp_path):
    write(tmp_path / "train.csv", "path,labels\na.jpg,cat|dog\n")
    write(tmp_path / "val.csv", "path,cat\na.jpg,1\n")
    with pytest.raises(DataError, match=r"val.csv has no column labels, but .*train.csv has one"):
        table(tmp_path, "val")


def test_the_drawn_split_is_kept_when_images_are_added(tmp_path):
    names = [f"{i}.jpg" for i in range(2000)]
    path = write(tmp_path / "t.csv", "path,labels\n" + "".join(f"{n},cat\n" for n in names))
    train, val = rows(table(path, "train")), rows(table(path, "val"))
    assert not {*train} & {*val}
    assert {*train} | {*val} == {*names}
    assert len(val) == pytest.approx(400, abs=60)
    assert len(table(path, "val", val_share=0.5)) == pytest.approx(1000, abs=80)
    assert rows(table(path, "val", split_seed=1)) != val
    write(path, "path,labels\nnew.jpg,cat\n" + "".join(f"{n},cat\n" for n in reversed(names)))
    assert {*rows(table(path, "val"))} - {"new.jpg"} == {*val}


def test_a_byte_order_mark_quotes_and_spaces_do_no_harm(tmp_path):
    text = 'path, labels ,split\n"a, b.jpg", cat|dog ,train\n'
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert rows(table(tmp_path, "train")) == {"a, b.jpg": [1, 1]}


def test_quotation_marks_in_the_name_of_a_class(tmp_path):
    (tmp_path / "t.csv").write_text('path,split,"a ""b"", c"\n1.jpg,train,1\n')
    assert table(tmp_path, "train").classes == ('a "b", c',)


def test_an_absolute_path_inside_the_folder_is_taken(tmp_path):
    path = write(tmp_path / "t.csv", f"path,labels,split\n{tmp_path}/a.jpg,cat,train\n")
    assert rows(table(path, "train")) == {"a.jpg": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,cat\na.jpg,1\nb.jpg,2\n", "row 3, column cat: '2' is not from 0 to 1, -1 or empty"),
        ("path,cat\na.jpg,1\nb.jpg,yes\n", "row 3, column cat: 'yes' is not from 0 to 1, -1 or e"),
        ("path,cat\na.jpg,nan\n", "row 2, column cat: 'nan' is not"),
        ("path,cat\na.jpg,-0.5\n", "row 2, column cat: '-0.5' is not"),
        ("path;cat\na.jpg;0,5\nb.jpg;1,5\n", "row 3, column cat: '1,5' is not"),
        ("path;cat\na.jpg;1\nb.jpg;1;0\n", "row 3 has 3 cells, not 2"),
        ("path,cat\na.jpg,1\n\nb.jpg,1\n,1\n", "row 5, column path: a cell is empty"),
        ("path,cat,split\na.jpg,1,\n", "row 2, column split: a cell is empty"),
        ("path,cat,split\na.jpg,1,train\na.jpg,0,train\n", "row 3: 'a.jpg' is already at .*row 2"),
        ("path,cat,split\n./a.jpg,1,train\na.jpg,0,train\n", "row 3: 'a.jpg' is already at .*row"),
        ("path,cat,split\n../a.jpg,1,train\n", "row 2: '../a.jpg' is not a path inside"),
        ("path,cat,split\n/etc/a.jpg,1,train\n", "row 2: '/etc/a.jpg' is not a path inside"),
        ("path,split\na.jpg,train\n", "has no class: give it"),
        ("path,labels,split\na.jpg,,train\n", "has no class: give it names in `labels`"),
        ("image_path;cat\na.jpg;1\n", "no column path or .* image, only: image_path, cat$"),
        ("path,cat\na.jpg,1\nb.jpg,1,0\n", "row 3 has 3 cells, not 2"),
        ('path,cat\na.jpg,1\n"b.jpg,1\n', "line 3: unexpected end of data"),
        ('"path,cat\na.jpg,1\n"', r"the name of a column has several lines: 'path,cat\\na"),
        ("path,cat,cat\na.jpg,1,1\n", "column cat is there twice"),
        ("", "empty CSV"),
        ("path,cat\n", "has no rows"),
    ],
)
def test_a_wrong_table_is_an_error_that_names_row_and_column(tmp_path, text, message):
    path = write(tmp_path / "labels.csv", text)
    with pytest.raises(DataError, match=message) as error:
        table(path, "train")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_utf_8_or_not_parquet_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"path,labels\na.jpg,cat\nb.jpg,caf\xe9\n")
    with pytest.raises(DataError, match=r"t.csv: line 3 is not UTF-8"):
        table(tmp_path / "t.csv", "train")
    write(tmp_path / "t.parquet", "path,labels\n")
    with pytest.raises(DataError, match=r"t.parquet cannot be read: Parquet magic bytes"):
        table(tmp_path / "t.parquet", "train")


def test_a_damaged_table_does_not_get_the_memory_it_asks_for():
    """Its bytes are the fuzzer's: a page that claims a negative number of values."""
    with pytest.raises(DataError, match=r"damaged.parquet cannot be read: .*number of values"):
        table(Path(__file__).parents[1] / "golden/damaged.parquet", "train")


def test_what_is_there_is_said_for_what_is_not(tmp_path):
    path = write(tmp_path / "t.csv", "path,labels,split\na.jpg,cat,train\nb.jpg,cat,test\n")
    with pytest.raises(UsageError, match=r"no split 'val' .*t.csv.* choose from test, train"):
        table(path, "val")
    with pytest.raises(DataError, match=r"none.csv is not there: .* holds t.csv"):
        table(tmp_path / "none.csv", "train")
    with pytest.raises(DataError, match=r"labels.csv is not there: .* holds t.csv"):
        table(tmp_path / "none", "train")
