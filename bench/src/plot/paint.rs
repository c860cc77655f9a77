//! Shapes to files.

use std::fmt::Write as _;

use anyhow::Context as _;
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster};

use super::{Color, Picture, Shape};

/// The picture as SVG.
pub(super) fn svg(picture: &Picture) -> String {
    let (width, height) = picture.size;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">\n"
    );
    for shape in &picture.shapes {
        // Writing to a string does not fail.
        let _ok = match shape {
            Shape::Box {
                at: (x, y),
                size: (width, height),
                color,
            } => writeln!(
                text,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{}\"/>",
                hex(*color)
            ),
            Shape::Text {
                at: (x, y),
                text: words,
                large,
                color,
            } => {
                let (size, weight) = if *large { (20, "bold") } else { (14, "normal") };
                writeln!(
                    text,
                    "<text x=\"{x}\" y=\"{}\" font-family=\"Noto Sans Mono, DejaVu Sans Mono, monospace\" font-size=\"{size}\" font-weight=\"{weight}\" fill=\"{}\" xml:space=\"preserve\">{}</text>",
                    y + size,
                    hex(*color),
                    escape(words)
                )
            }
        };
    }
    text.push_str("</svg>\n");
    text
}

fn hex([red, green, blue]: Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// The picture as PNG.
pub(super) fn png(picture: &Picture) -> anyhow::Result<Vec<u8>> {
    let (width, height) = picture.size;
    let mut canvas = Canvas {
        width: width as usize,
        pixels: vec![255; width as usize * height as usize * 3],
    };
    for shape in &picture.shapes {
        match shape {
            Shape::Box { at, size, color } => canvas.fill(*at, *size, *color),
            Shape::Text {
                at,
                text,
                large,
                color,
            } => canvas.write(*at, text, *large, *color),
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().context("begin a PNG")?;
    writer
        .write_image_data(&canvas.pixels)
        .context("encode a PNG")?;
    writer.finish().context("finish a PNG")?;
    Ok(bytes)
}

struct Canvas {
    width: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn fill(&mut self, at: (u32, u32), size: (u32, u32), color: Color) {
        for y in at.1..at.1 + size.1 {
            for x in at.0..at.0 + size.0 {
                self.blend(x as usize, y as usize, color, 255);
            }
        }
    }

    fn write(&mut self, at: (u32, u32), text: &str, large: bool, color: Color) {
        let (weight, height) = if large {
            (FontWeight::Bold, RasterHeight::Size24)
        } else {
            (FontWeight::Regular, RasterHeight::Size16)
        };
        let mut left = at.0 as usize;
        for letter in text.chars() {
            let Some(raster) = get_raster(letter, weight, height) else {
                continue;
            };
            for (y, line) in raster.raster().iter().enumerate() {
                for (x, opacity) in line.iter().enumerate() {
                    self.blend(left + x, at.1 as usize + y, color, *opacity);
                }
            }
            left += raster.width();
        }
    }

    /// Outside of the picture nothing happens.
    fn blend(&mut self, x: usize, y: usize, color: Color, opacity: u8) {
        let start = (y * self.width + x) * 3;
        if x >= self.width || opacity == 0 {
            return;
        }
        let Some(pixel) = self.pixels.get_mut(start..start + 3) else {
            return;
        };
        let opacity = u32::from(opacity);
        for (old, new) in pixel.iter_mut().zip(color) {
            let mixed = u32::from(*old) * (255 - opacity) + u32::from(new) * opacity;
            *old = (mixed / 255) as u8;
        }
    }
}
