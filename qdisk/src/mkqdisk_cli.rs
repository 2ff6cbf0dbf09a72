//! `mkqdisk`: the historic command line, its texts and exit codes; `--json` and `--yes` are ours.

use crate::mkqdisk::{self, Found};
use cairn_base::exit;
use std::io::{BufRead, Write};
use std::time::{Duration, UNIX_EPOCH};

const USAGE: &str = "\
usage: mkqdisk -c DEVICE -l LABEL [-y]   make a quorum disk
       mkqdisk -L [-d] [DEVICE…]         list quorum disks (of the given devices, else of this host)
       mkqdisk -f LABEL [-d] [DEVICE…]   find quorum disks by label
       mkqdisk -h

  -c DEVICE   device, partition (/dev/…, file:/path, …#part=N) or image file of at least 1 MiB; all on it is lost
  -l LABEL    label, at most 118 bytes
  -L          list
  -f LABEL    print the devices that carry LABEL
  -d          with -L and -f: also the status blocks of the nodes
  -O          overwrite a file system, partition table or the like; without it -y refuses to
  -y, --yes   do not ask before overwriting (also -q, --quiet, which prints nothing but errors)
  --json      with -L and -f: print a JSON array

Exit status: 0 done, or declined at the question; 1 error, or nothing found by -f; 2 wrong usage.
";

#[derive(Default)]
struct Args {
    create: Option<String>,
    label: Option<String>,
    find: Option<String>,
    list: bool,
    details: u32,
    yes: bool,
    overwrite: bool,
    quiet: bool,
    json: bool,
    help: bool,
    devices: Vec<String>,
}

fn parse(args: &[String]) -> Result<Args, String> {
    let mut a = Args::default();
    let mut it = args.iter();
    while let Some(arg) = it.next() {
        let mut value = || it.next().cloned().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "-c" => a.create = Some(value()?),
            "-l" => a.label = Some(value()?),
            "-f" => a.find = Some(value()?),
            "-L" => a.list = true,
            "-d" => a.details += 1,
            "-y" | "--yes" => a.yes = true,
            "-O" => a.overwrite = true,
            "-q" | "--quiet" => (a.yes, a.quiet) = (true, true),
            "--json" => a.json = true,
            "-h" | "--help" => a.help = true,
            s if s.starts_with('-') => return Err(format!("unknown option {s}")),
            s => a.devices.push(s.to_owned()),
        }
    }
    Ok(a)
}

/// The command. `args` without the program's name.
pub fn main(args: &[String]) -> i32 {
    let stdin = std::io::stdin();
    run(args, &mut stdin.lock(), &mut std::io::stdout(), &mut std::io::stderr())
}

/// The same with its streams given.
pub fn run(args: &[String], input: &mut dyn BufRead, out: &mut dyn Write, err: &mut dyn Write) -> i32 {
    // An error here means that somebody closed our output; there is nobody to tell.
    perform(args, input, out, err).unwrap_or(exit::FAILED)
}

fn perform(
    args: &[String],
    input: &mut dyn BufRead,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> std::io::Result<i32> {
    let a = match parse(args) {
        Ok(a) => a,
        Err(e) => {
            writeln!(err, "mkqdisk: {e}\n{USAGE}")?;
            return Ok(exit::USAGE);
        }
    };
    if !a.quiet && !a.json {
        writeln!(out, "mkqdisk v{}\n", env!("CARGO_PKG_VERSION"))?;
    }
    if a.help {
        write!(out, "{USAGE}")?;
        return Ok(exit::OK);
    }
    let modes = usize::from(a.list)
        + usize::from(a.find.is_some())
        + usize::from(a.create.is_some() || a.label.is_some());
    if modes != 1 {
        write!(err, "{USAGE}")?;
        return Ok(exit::USAGE);
    }
    if a.list || a.find.is_some() {
        return show(&a, out, err);
    }
    let (Some(device), Some(label)) = (&a.create, &a.label) else {
        writeln!(err, "Both a device and a label are required")?;
        return Ok(exit::FAILED);
    };
    create(&a, device, label, input, out, err)
}

fn create(
    a: &Args,
    device: &str,
    label: &str,
    input: &mut dyn BufRead,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> std::io::Result<i32> {
    let fail = |err: &mut dyn Write, e: mkqdisk::MkError| {
        writeln!(err, "mkqdisk: {e}")?;
        Ok(exit::FAILED)
    };
    if let Err(e) = mkqdisk::check_label(label) {
        return fail(err, e);
    }
    let present = match mkqdisk::present(device) {
        Ok(p) => p,
        Err(e) => return fail(err, e),
    };
    if let Some(what) = present.foreign
        && a.yes
        && !a.overwrite
    {
        return fail(err, mkqdisk::MkError::Foreign { device: device.to_owned(), what });
    }
    if !a.quiet {
        writeln!(out, "Writing new quorum disk label '{label}' to {device}.")?;
        if let Some(old) = &present.label {
            let used = if present.used { ", and nodes have used it" } else { "" };
            writeln!(out, "The device carries the quorum disk '{old}'{used}.")?;
        }
        if let Some(what) = present.foreign {
            writeln!(out, "The device appears to contain {what}.")?;
        }
        write!(out, "WARNING: About to destroy all data on {device}; proceed [N/y] ? ")?;
        out.flush()?;
    }
    if a.yes {
        if !a.quiet {
            writeln!(out, "y")?;
        }
    } else {
        let mut answer = String::new();
        input.read_line(&mut answer)?;
        if !answer.starts_with(['y', 'Y']) {
            writeln!(out, "Good thinking.")?;
            return Ok(exit::OK);
        }
    }
    if present.label.is_some() && !a.quiet {
        writeln!(out, "Warning: Initializing previously initialized partition")?;
    }
    let mut lines = Vec::new();
    let made = mkqdisk::create(device, label, |n| lines.push(n));
    if !a.quiet {
        for n in lines {
            writeln!(out, "Initializing status block for node {n}...")?;
        }
    }
    match made {
        Ok(()) => Ok(exit::OK),
        Err(e) => fail(err, e),
    }
}

fn show(a: &Args, out: &mut dyn Write, err: &mut dyn Write) -> std::io::Result<i32> {
    let (mut found, errors) = mkqdisk::scan(&a.devices);
    if let Some(label) = &a.find {
        found.retain(|f| f.label == *label);
    }
    for e in &errors {
        writeln!(err, "mkqdisk: {e}")?;
    }
    if a.json {
        let text = serde_json::to_string_pretty(&found).map_err(std::io::Error::other)?;
        writeln!(out, "{text}")?;
    } else {
        for f in &found {
            print(f, a.details, out)?;
        }
    }
    if let Some(label) = a.find.as_ref().filter(|_| found.is_empty() && errors.is_empty()) {
        let place =
            if a.devices.is_empty() { "this host's devices".to_owned() } else { a.devices.join(", ") };
        writeln!(
            err,
            "mkqdisk: no quorum disk labelled '{label}' on {place}; mkqdisk -L lists what is there"
        )?;
    }
    let nothing = a.find.is_some() && found.is_empty();
    Ok(if nothing || !errors.is_empty() { exit::FAILED } else { exit::OK })
}

fn time(secs: u64) -> String {
    mkqdisk::ctime(UNIX_EPOCH + Duration::from_secs(secs.min(1 << 40)))
}

fn print(f: &Found, details: u32, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "{}:", f.device)?;
    writeln!(out, "\tMagic:                {:08x}", f.magic)?;
    writeln!(out, "\tLabel:                {}", f.label)?;
    writeln!(out, "\tCreated:              {}", time(f.created))?;
    writeln!(out, "\tHost:                 {}", f.host)?;
    writeln!(out, "\tKernel Sector Size:   {}", f.kernel_sector_size)?;
    writeln!(out, "\tRecorded Sector Size: {}\n", f.recorded_sector_size)?;
    if details == 0 {
        return Ok(());
    }
    for n in &f.nodes {
        let cycle = |us: u64| format!("{}.{:06} seconds", us / 1_000_000, us % 1_000_000);
        writeln!(out, "Status block for node {}", n.node)?;
        writeln!(out, "\tLast updated by node {}", n.updated_by)?;
        writeln!(out, "\tLast updated on {}", time(n.updated))?;
        writeln!(out, "\tState: {}", n.state)?;
        writeln!(out, "\tFlags: {:04x}", n.flags)?;
        writeln!(out, "\tScore: {}/{}", n.score, n.score_max)?;
        writeln!(out, "\tAverage Cycle speed: {}", cycle(n.average_cycle_us))?;
        writeln!(out, "\tLast Cycle speed: {}", cycle(n.last_cycle_us))?;
        writeln!(out, "\tIncarnation: {:08x}{:08x}", n.incarnation >> 32, n.incarnation & 0xFFFF_FFFF)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mkqdisk(args: &[&str], answer: &str) -> (i32, String, String) {
        let args: Vec<String> = args.iter().map(|s| (*s).to_owned()).collect();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run(&args, &mut answer.as_bytes(), &mut out, &mut err);
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    fn image(dir: &tempfile::TempDir, size: u64) -> String {
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_disk_is_made_listed_and_found_in_the_historic_words() {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(&dir, 1 << 20);
        let (code, out, err) = mkqdisk(&["-c", &disk, "-l", "myqdisk"], "y\n");
        assert_eq!((code, err.as_str()), (0, ""));
        let version = format!("mkqdisk v{}\n\n", env!("CARGO_PKG_VERSION"));
        let text = format!(
            "{version}Writing new quorum disk label 'myqdisk' to {disk}.\n\
             WARNING: About to destroy all data on {disk}; proceed [N/y] ? \
             Initializing status block for node 1...\n"
        );
        assert!(out.starts_with(&text), "{out}");
        assert!(out.ends_with("Initializing status block for node 16...\n"));

        let (code, out, _) = mkqdisk(&["-L", "-d", &disk], "");
        assert_eq!(code, 0);
        let head =
            format!("{version}{disk}:\n\tMagic:                eb7a62c2\n\tLabel:                myqdisk\n");
        assert!(out.starts_with(&head), "{out}");
        assert!(
            out.contains("\tRecorded Sector Size: 512\n") && !out.contains("Status block for node"),
            "{out}"
        );

        let (code, out, _) = mkqdisk(&["-f", "myqdisk", "--json", &disk], "");
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(
            (code, json[0]["label"].as_str(), json[0]["extension"].as_bool()),
            (0, Some("myqdisk"), Some(true))
        );
        assert_eq!(mkqdisk(&["-f", "another", &disk], "").0, 1);
    }

    #[test]
    fn declining_changes_nothing_and_a_disk_in_use_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(&dir, 2 << 20);
        assert_eq!(mkqdisk(&["-q", "-c", &disk, "-l", "one"], ""), (0, String::new(), String::new()));
        let (code, out, _) = mkqdisk(&["-c", &disk, "-l", "two"], "\n");
        assert_eq!(code, 0);
        assert!(out.contains("carries the quorum disk 'one'.") && out.ends_with("Good thinking.\n"), "{out}");
        assert_eq!(crate::mkqdisk::examine(&disk).unwrap().unwrap().label, "one");
        let (_, out, _) = mkqdisk(&["-y", "-c", &disk, "-l", "two"], "");
        assert!(out.contains("Warning: Initializing previously initialized partition"), "{out}");
        assert_eq!(crate::mkqdisk::examine(&disk).unwrap().unwrap().label, "two");
    }

    #[test]
    fn wrong_use_and_unfit_devices_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(&dir, 512 << 10);
        let (code, _, err) = mkqdisk(&["-c", &disk], "");
        assert_eq!((code, err.as_str()), (1, "Both a device and a label are required\n"));
        let (code, _, err) = mkqdisk(&["-c", &disk, "-l", "x", "-y"], "");
        assert!(code == 1 && err.contains("too small"), "{err}");
        assert_eq!(mkqdisk(&["-c", &disk, "-l", &"x".repeat(119), "-y"], "").0, 1);
        assert_eq!(mkqdisk(&["-c", "/nonexistent/disk", "-l", "x", "-y"], "").0, 1);
        assert_eq!(mkqdisk(&["--frobnicate"], "").0, 2);
        assert_eq!(mkqdisk(&["-L", "-f", "x"], "").0, 2);
        assert_eq!(mkqdisk(&["-h"], "").0, 0);
    }
}
