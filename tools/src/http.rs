//! `cairn http-serve`: files of a directory over HTTP, for the demonstration's service.
//!
//! Built on tiny_http. GET and HEAD only; no path leaves the directory.

use clap::Parser;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use tiny_http::{Header, Method, Response, Server};

#[derive(Parser, Debug)]
#[command(name = "http-serve", about = "Serve the files of a directory over HTTP")]
struct Args {
    /// Directory to serve
    #[arg(long)]
    dir: PathBuf,
    /// Address and port, for example 127.0.0.1:8080
    #[arg(long)]
    listen: String,
    /// Write the process id here once it listens
    #[arg(long)]
    pid_file: Option<PathBuf>,
    /// Sent as header X-Served-By
    #[arg(long, default_value = "")]
    name: String,
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match crate::classic::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let server = match Server::http(args.listen.as_str()) {
        Ok(s) => s,
        Err(e) => {
            eprintln!("http-serve: cannot listen on {}: {e}", args.listen);
            return 1;
        }
    };
    if let Some(path) = &args.pid_file
        && let Err(e) = std::fs::write(path, format!("{}\n", std::process::id()))
    {
        eprintln!("http-serve: {}: {e}", path.display());
        return 1;
    }
    for request in server.incoming_requests() {
        let by = Header::from_bytes("X-Served-By", args.name.as_bytes()).ok();
        let path = file_of(&args.dir, request.url());
        let sent = match (request.method(), path.and_then(|p| File::open(p).ok())) {
            (Method::Get | Method::Head, Some(file)) => {
                let mut response = Response::from_file(file);
                if let Some(h) = by {
                    response.add_header(h);
                }
                request.respond(response)
            }
            (Method::Get | Method::Head, None) => request.respond(Response::empty(404)),
            _ => request.respond(Response::empty(405)),
        };
        if let Err(e) = sent {
            eprintln!("http-serve: {e}");
        }
    }
    0
}

/// The file a URL path names, or nothing if it tries to leave the directory.
fn file_of(dir: &Path, url: &str) -> Option<PathBuf> {
    let path = url.split(['?', '#']).next()?.trim_start_matches('/');
    let path = if path.is_empty() { "index.html" } else { path };
    let relative = Path::new(path);
    relative.components().all(|c| matches!(c, Component::Normal(_))).then(|| dir.join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_url_leaves_the_directory() {
        let dir = Path::new("/srv");
        assert_eq!(file_of(dir, "/a/b?x=1"), Some("/srv/a/b".into()));
        assert_eq!(file_of(dir, "/"), Some("/srv/index.html".into()));
        assert_eq!(file_of(dir, "/../etc/passwd"), None);
        assert_eq!(file_of(dir, "//etc/passwd"), Some("/srv/etc/passwd".into()));
    }
}
