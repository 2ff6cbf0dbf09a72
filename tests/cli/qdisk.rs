//! `mkqdisk`.

use super::{blank, put, say, scratch, text, untouched, volume};
use cairn_base::exit;
use lun::part::{self, PartSpec};
use std::path::Path;

/// A GPT with two partitions.
pub(crate) fn partition(device: &Path) {
    let lun = lun::open(text(device), &lun::OpenOptions::default()).expect("open");
    let spec = |name: &str, guid: u8, size: Option<u64>| PartSpec {
        name: name.into(),
        size,
        type_guid: part::TYPE_LINUX_DATA,
        guid: [guid; 16],
    };
    let parts = [spec("quorum", 1, Some(4 << 20)), spec("volume", 2, Some(32 << 20))];
    part::create(lun.as_ref(), [9; 16], &parts).expect("partition table");
}

#[test]
fn a_label_that_is_not_there_is_told() {
    let dir = scratch();
    let disk = blank(dir.path(), "disk", 2 << 20);
    let d = text(&disk);
    untouched(&disk, || {
        say(&["mkqdisk", "-f", "lost", d])
            .refused(exit::FAILED, &["no quorum disk labelled 'lost'", d, "mkqdisk -L"]);
    });
    say(&["mkqdisk", "-q", "-c", d, "-l", "found"]).worked();
    untouched(&disk, || {
        say(&["mkqdisk", "-f", "lost", d]).refused(exit::FAILED, &["no quorum disk labelled 'lost'"]);
        let said = say(&["mkqdisk", "-f", "found", d]);
        assert!(said.worked().out.contains("found"), "{}", said.out);
        say(&["mkqdisk", "-f", "found", "/nonexistent/disk"])
            .refused(exit::FAILED, &["/nonexistent/disk", "cannot open"]);
    });
}

#[test]
fn something_else_is_not_overwritten_by_yes_alone() {
    let dir = scratch();
    volume(dir.path(), "gfs2");
    put(&blank(dir.path(), "ext4", 64 << 20), 1080, &[0x53, 0xef]);
    let disk = blank(dir.path(), "disk", 64 << 20);
    partition(&disk);
    for (name, what) in [
        ("gfs2", "a GFS2 (or GFS) file system"),
        ("ext4", "an ext2/3/4 file system"),
        ("disk", "a GPT partition table"),
    ] {
        let device = dir.path().join(name);
        let d = text(&device);
        untouched(&device, || {
            for yes in ["-y", "-q"] {
                say(&["mkqdisk", yes, "-c", d, "-l", "x"])
                    .refused(exit::FAILED, &[d, "appears to contain", what, "nothing was written", "-O"]);
            }
            // asked, without an answer: the thing is named, nothing happens
            let said = say(&["mkqdisk", "-c", d, "-l", "x"]);
            assert!(said.worked().out.contains(what) && said.out.contains("Good thinking."), "{}", said.out);
        });
        say(&["mkqdisk", "-q", "-O", "-c", d, "-l", "new"]).worked();
        say(&["mkqdisk", "-f", "new", d]).worked();
    }
}

#[test]
fn unfit_devices_and_arguments_are_refused() {
    let dir = scratch();
    blank(dir.path(), "empty", 0);
    blank(dir.path(), "small", 512 << 10);
    partition(&blank(dir.path(), "disk", 64 << 20));
    for (name, words) in [
        ("empty", ["is empty", "empty"]),
        ("small", ["too small", "1048576 are needed"]),
        ("disk#part=3", ["no usable partition 3", "disk#part=3"]),
        ("nothing", ["cannot open", "No such file"]),
    ] {
        let device = dir.path().join(name);
        let file = dir.path().join(name.split('#').next().unwrap());
        untouched(&file, || {
            say(&["mkqdisk", "-y", "-c", text(&device), "-l", "x"]).refused(exit::FAILED, &words);
        });
    }
    let disk = blank(dir.path(), "good", 2 << 20);
    let d = text(&disk);
    untouched(&disk, || {
        say(&["mkqdisk", "--bogus"]).refused(exit::USAGE, &["unknown option --bogus", "usage:"]);
        say(&["mkqdisk"]).refused(exit::USAGE, &["usage:"]);
        say(&["mkqdisk", "-L", "-f", "x", d]).refused(exit::USAGE, &["usage:"]);
        // the historic code of this one
        say(&["mkqdisk", "-c", d]).refused(exit::FAILED, &["Both a device and a label are required"]);
        let long = "x".repeat(119);
        for label in ["", "a\nb", &long] {
            say(&["mkqdisk", "-y", "-c", d, "-l", label]).refused(exit::FAILED, &["label"]);
        }
    });
}
