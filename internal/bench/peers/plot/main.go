// Command plot draws the CSV of the sensitivity benchmark as SVG. It is a
// module of its own so that the product does not depend on a plotting library.
package main

import (
	"encoding/csv"
	"fmt"
	"image/color"
	"os"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: plot IN.csv OUT.svg")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

// run draws throughput and latency side by side, a line for each bandwidth.
func run(in, out string) error {
	f, err := os.Open(in)
	if err != nil {
		return err
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		return err
	}
	if len(rows) < 2 {
		return fmt.Errorf("%s has no figures", in)
	}
	left, err := graph(rows[1:], "Pull, first touch in order", "MB/s", 2)
	if err != nil {
		return err
	}
	left.Y.Scale, left.Y.Tick.Marker, left.Y.Min = plot.LogScale{}, plot.LogTicks{Prec: 4}, 1
	right, err := graph(rows[1:], "One fault, nothing else under way", "ms", 3)
	if err != nil {
		return err
	}
	right.Y.Min = 0
	c := vgsvg.New(24*vg.Centimeter, 9*vg.Centimeter)
	plots := [][]*plot.Plot{{left, right}}
	tiles := draw.Tiles{Rows: 1, Cols: 2, PadX: vg.Centimeter}
	for i, at := range plot.Align(plots, tiles, draw.New(c))[0] {
		plots[0][i].Draw(at)
	}
	w, err := os.Create(out)
	if err != nil {
		return err
	}
	if _, err := c.WriteTo(w); err != nil {
		w.Close()
		return err
	}
	return w.Close()
}

// graph draws one column of the CSV against the round-trip time, which is the
// second; the first names the line.
func graph(rows [][]string, title, unit string, column int) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, "round trip, ms", unit
	p.BackgroundColor = color.White
	p.Legend.Top = true
	lines := map[string]plotter.XYs{}
	var order []string
	for _, row := range rows {
		x, err := strconv.ParseFloat(row[1], 64)
		if err != nil {
			return nil, err
		}
		y, err := strconv.ParseFloat(row[column], 64)
		if err != nil {
			return nil, err
		}
		if lines[row[0]] == nil {
			order = append(order, row[0])
		}
		lines[row[0]] = append(lines[row[0]], plotter.XY{X: x, Y: y})
	}
	for i, name := range order {
		line, points, err := plotter.NewLinePoints(lines[name])
		if err != nil {
			return nil, err
		}
		line.Color, points.Color, points.Shape = plotutil.Color(i), plotutil.Color(i), plotutil.Shape(i)
		p.Add(line, points)
		p.Legend.Add(name, line, points)
	}
	return p, nil
}
