package bench

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// Groups returns the names of the groups that there is something to tell of.
func (r *Report) Groups() []string {
	var out []string
	for _, x := range r.results {
		out = append(out, x.Group)
	}
	for _, f := range r.failures {
		out = append(out, f.group)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// WriteTables prints the results of all groups and their verdicts as Markdown.
func (r *Report) WriteTables(w io.Writer, goals []Goal) {
	for _, group := range r.Groups() {
		fmt.Fprintf(w, "\n### %s\n\n", group)
		r.WriteGroup(w, group, goals)
	}
}

// WriteGroup prints one group: goals, met or missed, then all figures, then
// what could not be measured.
func (r *Report) WriteGroup(w io.Writer, group string, goals []Goal) {
	own := slices.DeleteFunc(slices.Clone(goals), func(g Goal) bool { return g.Group != group })
	writeVerdicts(w, r.Judge(own))
	fmt.Fprint(w, "| scenario | metric | who | median | unit | runs |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, x := range r.Results() {
		if x.Group == group {
			fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %d |\n", x.Scenario, x.Metric, x.Subject, figure(x.Median), x.Unit, len(x.Samples))
		}
	}
	r.writeFailures(w, group)
}

func writeVerdicts(w io.Writer, verdicts []Verdict) {
	if len(verdicts) == 0 {
		return
	}
	met := 0
	for _, v := range verdicts {
		if v.Met {
			met++
		}
	}
	fmt.Fprintf(w, "%d of %d goals met.\n\n| scenario | metric | comparison | goal | measured | |\n| --- | --- | --- | --- | --- | --- |\n", met, len(verdicts))
	for _, v := range verdicts {
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s |\n",
			v.Goal.Scenario, v.Goal.Metric, v.Goal.comparison(), v.Goal.bound(), v.measured(), v.word())
	}
	fmt.Fprintln(w)
}

func (r *Report) writeFailures(w io.Writer, group string) {
	title := "\nNot measured:\n\n"
	for _, f := range r.failures {
		if f.group != group {
			continue
		}
		line, _, _ := strings.Cut(f.err.Error(), "\n")
		fmt.Fprintf(w, "%s- %s, %s: %s\n", title, f.scenario, f.subject, line)
		title = ""
	}
}

// Splice returns doc with text between the markers of a group, which are HTML
// comments on lines of their own: <!-- bench GROUP --> and <!-- end GROUP -->.
func Splice(doc, group, text string) (string, error) {
	open, end := "<!-- bench "+group+" -->\n", "<!-- end "+group+" -->\n"
	before, rest, ok := strings.Cut(doc, open)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return "", fmt.Errorf("no section for %s: want the lines %q and %q", group, strings.TrimSpace(open), strings.TrimSpace(end))
	}
	return before + open + "\n" + strings.TrimSpace(text) + "\n\n" + end + after, nil
}
