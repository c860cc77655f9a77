//! Bars that say at a glance who wins, as SVG and as PNG.
//!
//! Both are drawn from one list of shapes, with a font that is compiled in, so that they look the same everywhere.

mod paint;

use std::{fs, path::Path};

use anyhow::Context as _;

use crate::{
    report,
    result::{Results, Row, base_of, less_is_better},
};

const WIDTH: u32 = 1100;
const MARGIN: u32 = 24;
const BAR_HEIGHT: u32 = 26;
const GAP: u32 = 8;
const TOP: u32 = 92;
const LABELS: u32 = 250;
const NUMBERS: u32 = 300;

type Color = [u8; 3];

const INK: Color = [32, 36, 42];
const FAINT: Color = [110, 118, 128];
const PAPER: Color = [255, 255, 255];
const AGENT: Color = [38, 120, 178];
const WINNER: Color = [20, 140, 80];
const KERNEL: Color = [200, 110, 60];
const LIMIT: Color = [176, 182, 190];

/// What is drawn. Coordinates in pixels from the upper left corner.
#[derive(Clone, Debug)]
pub(crate) enum Shape {
    Box {
        at: (u32, u32),
        size: (u32, u32),
        color: Color,
    },
    Text {
        /// Left end of the line, and its upper edge.
        at: (u32, u32),
        text: String,
        large: bool,
        color: Color,
    },
}

/// A picture.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) size: (u32, u32),
    pub(crate) shapes: Vec<Shape>,
}

/// Writes a picture of every workload that more than one mode ran, and returns how many there are.
pub fn write(results: &Results, dir: &Path) -> anyhow::Result<usize> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut written = 0;
    for workload in results.workloads() {
        let rows: Vec<&Row> = results
            .rows
            .iter()
            .filter(|row| row.workload == workload)
            .collect();
        if rows.len() < 2 {
            continue;
        }
        let picture = bars(results, workload, &rows);
        for (ending, bytes) in [
            ("svg", paint::svg(&picture).into_bytes()),
            ("png", paint::png(&picture)?),
        ] {
            let file = dir.join(format!("{workload}.{ending}"));
            fs::write(&file, bytes).with_context(|| format!("write {}", file.display()))?;
        }
        written += 1;
    }
    Ok(written)
}

/// One bar a mode, the best on top, and the whole point in the headline.
fn bars(results: &Results, workload: &str, rows: &[&Row]) -> Picture {
    let unit = rows.first().map_or("", |row| row.unit.as_str());
    let less = less_is_better(unit);
    let mut rows = rows.to_vec();
    rows.sort_by(|a, b| {
        let order = b.median.total_cmp(&a.median);
        if less { order.reverse() } else { order }
    });
    // A single wild value would leave nothing of the bars.
    let most = rows.iter().map(|row| row.median).fold(f64::MIN, f64::max) * 1.1;
    let winner = best_overlay(&rows).map_or("", |row| row.mode.as_str());
    let height = TOP + rows.len() as u32 * (BAR_HEIGHT + GAP) + MARGIN;
    let mut shapes = vec![
        Shape::Box {
            at: (0, 0),
            size: (WIDTH, height),
            color: PAPER,
        },
        text(
            (MARGIN, 16),
            headline(results, workload, winner, less),
            true,
            INK,
        ),
        text(
            (MARGIN, 52),
            format!(
                "{unit}, {} is better; median and range of {} rounds, ratio to {}",
                if less { "less" } else { "more" },
                results.run.rounds,
                results.run.bases()[0]
            ),
            false,
            FAINT,
        ),
    ];
    let scale = f64::from(WIDTH - LABELS - NUMBERS) / most.max(f64::MIN_POSITIVE);
    let pixels = |value: f64| (value.min(most) * scale).max(1.0) as u32;
    for (index, row) in rows.iter().enumerate() {
        let y = TOP + index as u32 * (BAR_HEIGHT + GAP);
        shapes.push(text((MARGIN, y + 5), row.mode.clone(), false, INK));
        shapes.push(Shape::Box {
            at: (LABELS, y),
            size: (pixels(row.median), BAR_HEIGHT),
            color: color(&row.mode, winner),
        });
        // The range, as a line across the end of the bar.
        shapes.push(Shape::Box {
            at: (LABELS + pixels(row.min), y + BAR_HEIGHT / 2 - 1),
            size: (pixels(row.max).saturating_sub(pixels(row.min)).max(1), 2),
            color: INK,
        });
        let ratio = results
            .ratio(
                workload,
                &row.mode,
                &base_of(&row.mode, results.run.bases()[0]),
            )
            .map_or_else(String::new, |ratio| format!("  {:.2}x", ratio.median));
        shapes.push(text(
            (LABELS + pixels(row.max.max(row.median)) + 10, y + 5),
            format!("{}{ratio}", report::number(row.median)),
            false,
            INK,
        ));
    }
    Picture {
        size: (WIDTH, height),
        shapes,
    }
}

fn text(at: (u32, u32), text: String, large: bool, color: Color) -> Shape {
    Shape::Text {
        at,
        text,
        large,
        color,
    }
}

/// The best of those that are an overlay: the others are there to show what is possible.
fn best_overlay<'a>(rows: &[&'a Row]) -> Option<&'a Row> {
    rows.iter()
        .find(|row| {
            // Without a cluster's rules, or with very many, it is another contest.
            is_overlay(&row.mode) && row.mode != "kernel-vxlan" && !row.mode.ends_with("-2000")
        })
        .copied()
}

fn is_overlay(mode: &str) -> bool {
    ["agent", "base", "kernel-vxlan", "flanneld"]
        .iter()
        .any(|start| mode.starts_with(start))
}

fn headline(results: &Results, workload: &str, winner: &str, less: bool) -> String {
    let base = base_of(winner, results.run.bases()[0]);
    match results.ratio(workload, winner, &base) {
        Some(ratio) if less => {
            format!("{workload}: {winner} needs {:.2} of {}", ratio.median, base)
        }
        Some(ratio) => format!("{workload}: {winner} wins, {:.2}x {}", ratio.median, base),
        None if winner.is_empty() => workload.to_owned(),
        None => format!("{workload}: {winner} is the best overlay"),
    }
}

fn color(mode: &str, winner: &str) -> Color {
    if mode == winner {
        WINNER
    } else if mode.starts_with("agent") {
        AGENT
    } else if is_overlay(mode) {
        KERNEL
    } else {
        LIMIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::{Run, Samples};

    fn results() -> Results {
        let mut samples = Samples::default();
        let modes = ["direct", "kernel-vxlan-ct", "agent-established"];
        for (mode, value) in modes.iter().zip([900.0, 200.0, 700.0]) {
            samples.add("udp64", "1/s", mode, 0, value);
        }
        let modes = modes.map(str::to_owned);
        samples.results(Run::default(), &["udp64".to_owned()], &modes)
    }

    #[test]
    fn the_headline_names_the_best_overlay() {
        let results = results();
        let rows: Vec<&Row> = results.rows.iter().collect();
        let picture = bars(&results, "udp64", &rows);
        let svg = paint::svg(&picture);
        assert!(
            svg.contains("udp64: agent-established wins, 3.50x kernel-vxlan-ct"),
            "{svg}"
        );
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn the_longest_bar_leaves_room_for_its_number() {
        let results = results();
        let rows: Vec<&Row> = results.rows.iter().collect();
        for shape in bars(&results, "udp64", &rows).shapes {
            if let Shape::Text { at, text, .. } = shape {
                assert!(at.0 + text.len() as u32 * 8 < WIDTH, "{text}");
            }
        }
    }

    #[test]
    fn the_png_has_the_size_and_some_ink() {
        let results = results();
        let rows: Vec<&Row> = results.rows.iter().collect();
        let picture = bars(&results, "udp64", &rows);
        let bytes = paint::png(&picture).expect("a PNG");
        let decoder = png::Decoder::new(std::io::Cursor::new(bytes));
        let mut reader = decoder.read_info().expect("a header");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        let info = reader.next_frame(&mut pixels).expect("pixels");
        assert_eq!((info.width, info.height), picture.size);
        let has = |color: Color| pixels.chunks_exact(3).any(|pixel| pixel == color);
        assert!(has(WINNER) && has(KERNEL) && has(LIMIT) && has(INK));
    }
}
